"""What every rank does: join, load, generate. The only package that imports torch, diffsynth and xfuser."""
