"""ReDrafter speculative decoding on NVIDIA GPUs with TensorRT-LLM, and anywhere with PyTorch.

    from trtllm_redrafter import convert, build, load_engine

    convert(base="vicuna-7b", drafter="redrafter-vicuna-7b", output="checkpoint")
    build(checkpoint="checkpoint", output="engine")
    print(load_engine("engine").generate(["What is a tree?"])[0].text)
"""

__version__ = "0.1.0"
