"""Checkpoints: the folder (`store`), flat pieces of tensors (`pieces`), saving and resuming (`saving`), reading them
outside of training (`reader`)."""
