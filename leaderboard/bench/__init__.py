"""`moezoo bench core`: the MoE layer against its peers and against the floor, measured in one run."""
