"""What every rank does: join, load, generate. The only package that imports torch, diffsynth and xfuser."""

from parallel.quick_imports import install

install()
