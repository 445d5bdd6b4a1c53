"""Models: loading and building, and the forward passes of policy, critics and reference."""
