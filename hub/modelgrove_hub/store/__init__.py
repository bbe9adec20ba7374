"""Bytes: safetensors headers, tensors and writer, the blob store, manifests, fsck and gc."""
