"""Fused search step: policy, controller, schedules, train state."""
