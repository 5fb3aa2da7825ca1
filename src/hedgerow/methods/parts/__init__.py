"""What methods are composed of: one small file a part, each with its formula and its own checks.

    client:    change of what trains  -> through -> up ->  update
    server:    update -> undo up -> fold (mean) -> server step -> down ->  entry
    everybody: entry -> undo down -> undo through -> step ->  the model

Methods that stack adapters of any ranks (`hedgerow.methods.stacked`) have parts of another kind:

    client:    start -> train -> bits of factors ->  update
    server:    update -> weigh -> exact sums -> server step -> broadcast ->  entry

A part says what it makes (`kinds`) and refuses what it would not have made (`check`), so that the
functions of a composed method (`hedgerow.methods.composed`) are written once over all of them.
"""
