"""The fused search step: policy, controller, schedules, train state."""
