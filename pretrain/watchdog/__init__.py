"""End a run that hangs, and say which rank it hangs on.

watchdog        `Watchdog`: a thread per rank; the main rank judges the others, and they judge it
heartbeats      `Hub` and `Channel`: signs of life between ranks over TCP, which never block
hang_rules      who is lost or stalled: a judgement from what is known of each rank, without threads or sockets

The training loop tells its watchdog which phase it is in (`Run.phase`); heartbeats carry the phase to rank 0.
"""
