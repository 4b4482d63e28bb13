"""Models without PyTorch: exported as ONNX (package.py), run by ONNX Runtime (runner.py); edge devices that defer to a
server what they are not sure of."""
