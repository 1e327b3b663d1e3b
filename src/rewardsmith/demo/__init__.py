"""The embedded demo: the Countdown task (`countdown`) and the small base model trained for it (`model/`).

Data and standard-library code only; the catalogue serves the folder `model/` under the alias `countdown-tiny`.
"""
