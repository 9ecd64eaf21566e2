"""Pictures of what a model looks at, for papers and for watching a run: maps laid over photographs."""
