"""Pure decisions: tensors and numbers in, frozen values out; no processes, no CUDA, any time.

Legend of the shape suffixes used here, in ``reference.py`` and in ``kernels``::

    R ranks   E experts (logical)   S slots (physical)   L slots per rank
    T rows of one rank   K choices of a row   H hidden   I inner   N layers   G groups
"""
