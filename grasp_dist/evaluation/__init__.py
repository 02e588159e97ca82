"""What a fine-tune did: task, drift and retention probes, the activations' shift, statistics, and the report."""
