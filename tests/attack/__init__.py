"""Attack medim with damaged, hostile and nonsensical inputs, and count the faults.

`python -m tests.attack FOLDER` builds small runs in a folder, tries all cases with a fixed seed, and prints a Markdown
table. A case is a fault if it ends with a traceback, in no more than `MAX_SECONDS`, with more than `MAX_PEAK_BYTES` of
memory, with another exit code than documented, or if voxels differ and no one is informed. `tests/test_attack.py` tries
a sample.
"""
