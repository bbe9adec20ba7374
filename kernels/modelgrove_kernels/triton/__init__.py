"""The quantized linear layers as Triton kernels, for GPUs; `triton` is needed only when they are called.

They are tested on a CPU in Triton's interpreter, and compiled for NVIDIA's sm_80; how fast a GPU runs them is
unmeasured. Triton 3.7 compiles them for sm_90, sm_120 and AMD's gfx942 too, but has no int8 products for sm_75.
"""
