"""The network as an ONNX file, checked against PyTorch.

Needs ``pip install "mmauxq[export]"``: onnx, onnxscript and onnxruntime.
"""
