"""Models: loading and building, the forward passes of policy, critics and reference."""
