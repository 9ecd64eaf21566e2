"""One run, composed from models/, data/ and engine/: session, resume, rollback, summary, sample images, evaluation."""
