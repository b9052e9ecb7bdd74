"""Sources of images: one YAML and one function each."""
