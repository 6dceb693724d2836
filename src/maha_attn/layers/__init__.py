"""torch.nn modules on top of the operations."""
