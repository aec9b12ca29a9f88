"""What a run takes, computed from its configuration: GPU memory, time per step, days. No GPU is needed.

command         `lrnn plan`
report          tables and JSON for it
start           the lines that `lrnn pretrain` prints at its start
choose          the micro-batch, recomputation and ZeRO stage that are fastest within the memory
estimate        memory and speed of one setup
memory          memory by part when it is largest
activations     what layers keep for their backward pass
attention       what attention layers keep
speed           time of a step by part
collectives     what ZeRO sends, and how long it takes
sizes           sizes of a model, layer by layer
setup           what all of these are computed from
"""
