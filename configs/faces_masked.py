"""Diffusion on 50 faces of which half the pixels are never seen (Ambient Diffusion, arXiv 2305.19256), 16x16.

Differs from configs/faces.py in data.degrade and data.degrade_by. Of each image a fixed half of the pixels is hidden, and
of the rest a tenth is hidden anew at every step; samples are whole images.
Cost: that of configs/faces.py. Not yet run to its end: what it memorizes is not known.
"""

from dataclasses import replace

from mdiff.recipes.demo import STANDARD

config = replace(STANDARD, name="faces-masked", data=replace(STANDARD.data, degrade="mask", degrade_by=0.5))
