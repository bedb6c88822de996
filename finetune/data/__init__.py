"""Training data: lists of stereo files with word alignments, and the batches of codes made from them.

Shapes: `T` steps of 80 ms, `K` = 1 + n_q rows: the text, Moshi's Mimi codebooks, the user's Mimi codebooks.
"""
