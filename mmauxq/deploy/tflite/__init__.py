"""The network as a .tflite file for LiteRT, checked against PyTorch.

Needs ``pip install "mmauxq[tflite]"``: litert-torch and ai-edge-litert.
"""
