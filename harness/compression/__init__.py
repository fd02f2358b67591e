"""The compression methods: soft filter pruning, post-training pruning, APoT."""
