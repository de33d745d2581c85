"""Quantizers of other tools in the seat of ours.

``mmauxq compare`` trains them beside ours, from the same float network, with
the same loop, data and learning rate. In the folder of a clone::

    python -m mmauxq compare --out work_dirs/peers --seeds 0 1 2 --jobs 2 \\
        --float configs/float_r20_digits.py \\
        --arms plain=configs/qat_r20_w2a2_digits.py \\
        mmrazor=benchmarks/peers/mmrazor_r20_w2a2_digits.py

Those of brevitas need ``pip install brevitas==0.13.4``, in an environment of
its own: it asks for ``setuptools<81``.
"""
