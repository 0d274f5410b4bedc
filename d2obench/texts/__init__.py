"""Generated texts: English prose for tasks, and for statistics of a model's queries. Imports no torch.

``writer`` tells of people and facts, ``lexicon`` holds the names, things and sentence patterns that it is made of.
"""
