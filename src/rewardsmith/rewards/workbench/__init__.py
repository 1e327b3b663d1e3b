"""Reward functions before training: what they say of completions, what they cost, how they can be gamed.

`examine` runs them and makes a `report`; `measures` has the arithmetic, `faults` folds errors, `probes` writes texts
that deserve no reward, `findings` says what is wrong and what to change, `page` shows it all. Where rows and
completions come from is the business of `rewardsmith.rehearsal`.
"""
