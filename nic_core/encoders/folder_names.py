"""Names of the files in an encoder folder."""

WEIGHTS = "weights.safetensors"
CARD = "card.json"
PROGRAMS = {"torchscript": "network.pt", "torch.export": "network.pt2"}
"""Architecture of an encoder that is a program, to the archive of its network."""
