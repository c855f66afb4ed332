"""Models on disk, tensor by tensor: what is where in a folder of safetensors or a GGUF file."""
