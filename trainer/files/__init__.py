"""Files that are whole or not there: JSON, folders and safetensors. Imports nothing else of the trainer."""
