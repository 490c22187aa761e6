"""Pure tensor mathematics: no modules, no logging, no reduction over the batch. Imports torch alone.

Letters in local names: B examples, K responses (best first), S sequences, T tokens of the stream,
N response tokens, D width, V vocabulary, H heads.
"""
