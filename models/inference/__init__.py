"""Models prepared for inference: folded weights and fused operations."""
