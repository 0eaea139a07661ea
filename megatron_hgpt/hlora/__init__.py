"""H-LoRA on every linear of the frozen language model: one plugin for comprehension, one for generation.

For one linear, one plugin and one token x, of shape [in]::

    z = P x                   P = [A ; R]: r rows of A, then one row of R per expert
    g = softmax(z[r:])        the gate: how much each of the k experts counts for this token
    u = scale * z[:r] * g     expert e owns r / k consecutive rows of A, all multiplied by g[e]; scale = alpha / r * k
    y = W x + B u             W is frozen; B starts at zero, so training starts from the base model

While training, dropout acts on u.

The files, from the formula outwards::

    maths                     the formula, written plainly: the reference of all tests
    gate, gate_triton         from z to u, forward and backward, in torch and as one kernel each way
    plugins                   P and B of one plugin on one linear, which may be several linears fused into one
    linear, te_linear         the parallel linears that carry plugins, and what each of them communicates
    layer_spec                a decoder layer of such linears, which is told the task of each micro-batch

Must not import: vision, model, convert, data, engines.
"""
