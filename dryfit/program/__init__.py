"""Somebody's whole CUDA program, run as it stands on a machine without a GPU: what it needs of a card.

The program runs in a process of its own (:mod:`.process`), in which a card is simulated (:mod:`.child`): its own data,
model, loop and compiler. It is stopped after its second update, since an optimizer's states exist from the first on.
"""
