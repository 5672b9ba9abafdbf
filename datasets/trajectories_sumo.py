"""The weaving section driven by SUMO in this process (libsumo): a network and drivers of our own, Parquet out.

Rows come as front bumper and lane position; they leave as centre, in the road frame, with imprecise drivers.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ..errors import UserError
from . import trajectories_weave as weave
from .trajectories_weave import DIVERGE, LANE_WIDTH, LANES, LENGTH, MERGE, RAMP, RAMP_LANE

# Edge: from node, to node, first and last x, lanes from the leftmost to the rightmost, speed limit
_EDGES = {
    "up": ("a", "m", 0.0, MERGE, range(1, LANES + 1), weave.ROAD_LIMIT),
    "on": ("r0", "m", MERGE - RAMP, MERGE, [RAMP_LANE], weave.RAMP_LIMIT),
    "weave": ("m", "d", MERGE, DIVERGE, range(1, RAMP_LANE + 1), weave.ROAD_LIMIT),
    "down": ("d", "z", DIVERGE, LENGTH, range(1, LANES + 1), weave.ROAD_LIMIT),
    "off": ("d", "r1", DIVERGE, DIVERGE + RAMP, [RAMP_LANE], weave.RAMP_LIMIT),
}
_NODES = {"a": 0.0, "r0": MERGE - RAMP, "m": MERGE, "d": DIVERGE, "r1": DIVERGE + RAMP, "z": LENGTH}
_TYPES = {  # share, length, width, and what SUMO takes of a driver
    "car": (0.62, 4.6, 1.8, 'accel="2.6" tau="1.1" sigma="0.3" speedFactor="normc(0.95,0.15,0.6,1.2)" lcSpeedGain="3"'),
    "hasty": (0.28, 4.5, 1.8, 'accel="3.0" tau="0.8" sigma="0.3" speedFactor="normc(1.05,0.15,0.7,1.3)" lcSpeedGain="8"'
              ' lcAssertive="1.5"'),
    "truck": (0.10, 11.0, 2.5, 'accel="1.2" tau="1.5" sigma="0.2" speedFactor="normc(0.75,0.08,0.6,0.9)"'
              ' vClass="truck" lcSpeedGain="1"'),
}  # fmt: skip


def simulate(seeds: Sequence[int], seconds: float) -> dict[int, pl.DataFrame]:
    """One world per seed, one after the other: libsumo holds one simulation.

    Returns:
        seed -> rows of `trajectories_table.COLUMNS` at 10 Hz.

    Raises:
        UserError: SUMO cannot run.
    """
    return {seed: weave.finished(_drive(seed, seconds), seed, f"seed{seed}") for seed in seeds}


def _drive(seed: int, seconds: float) -> pl.DataFrame:
    import libsumo

    with tempfile.TemporaryDirectory() as folder:
        net, routes, out = (Path(folder) / name for name in ("net.xml", "routes.xml", "fcd.parquet"))
        net.write_text(network_xml())
        routes.write_text(_routes_xml(seconds))
        arguments = {
            "net-file": net, "route-files": routes, "step-length": 1 / weave.FRAME_RATE, "seed": seed,
            "lanechange.duration": weave.LANE_CHANGE_SECONDS, "time-to-teleport": -1, "collision.action": "warn",
            "xml-validation": "never", "no-step-log": "true", "no-warnings": "true", "fcd-output": out,
            "fcd-output.attributes": "id,x,y,speed,acceleration,lane,type", "precision": 4,
        }  # fmt: skip
        try:
            libsumo.start(["sumo", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))])
            try:
                libsumo.simulationStep(seconds)
            finally:
                libsumo.close()
        except Exception as error:  # libsumo's own classes, which differ between versions
            raise UserError(f"sumo_weave: SUMO stopped ({error}); use data.source=numpy_weave") from error
        rows = pl.read_parquet(out).drop_nulls("vehicle_id")
    kind = pl.col("vehicle_type")
    length = kind.replace_strict({name: about[1] for name, about in _TYPES.items()}, return_dtype=pl.Float64)
    width = kind.replace_strict({name: about[2] for name, about in _TYPES.items()}, return_dtype=pl.Float64)
    return rows.select(
        vehicle="vehicle_id",
        frame=(pl.col("timestep_time").cast(pl.Float64) * weave.FRAME_RATE).round().cast(pl.Int64),
        x=pl.col("vehicle_x").cast(pl.Float64) - 0.5 * length,
        plan=pl.col("vehicle_y").cast(pl.Float64),
        vx=pl.col("vehicle_speed").cast(pl.Float64),
        ax=pl.col("vehicle_acceleration").cast(pl.Float64),
        length=length,
        width=width,
    )


def network_xml() -> str:
    """The network: straight parallel lanes, so that x along the road needs no projection."""
    parts = ['<net version="1.20">', f'<location netOffset="0,0" convBoundary="0,{-RAMP_LANE * LANE_WIDTH},{LENGTH},0"'
             f' origBoundary="0,{-RAMP_LANE * LANE_WIDTH},{LENGTH},0" projParameter="!"/>']  # fmt: skip
    for name, (start, end, first, last, lanes, limit) in _EDGES.items():
        parts.append(f'<edge id="{name}" from="{start}" to="{end}" priority="1">')
        for index, lane in enumerate(reversed(lanes)):  # SUMO counts from the right
            y = (0.5 - lane) * LANE_WIDTH
            parts.append(
                f'<lane id="{name}_{index}" index="{index}" speed="{limit}" length="{last - first}"'
                f' width="{LANE_WIDTH}" shape="{first},{y:.2f} {last},{y:.2f}"/>'
            )
        parts.append("</edge>")
    for node, x in _NODES.items():
        into = [f"{name}_{i}" for name, edge in _EDGES.items() if edge[1] == node for i in range(len(edge[4]))]
        kind = "priority" if node in "md" else "dead_end"
        parts.append(
            f'<junction id="{node}" type="{kind}" x="{x}" y="0" incLanes="{" ".join(into)}" intLanes=""'
            f' shape="{x},0 {x},{-RAMP_LANE * LANE_WIDTH}">'
        )
        if kind == "priority":
            free = "0" * len(into)
            parts += [f'<request index="{i}" response="{free}" foes="{free}"/>' for i in range(len(into))]
        parts.append("</junction>")
    links = [("on", "weave", 0, 0), ("weave", "off", 0, 0)]
    links += [("up", "weave", i, i + 1) for i in range(LANES)] + [("weave", "down", i + 1, i) for i in range(LANES)]
    for start, end, a, b in links:
        parts.append(f'<connection from="{start}" to="{end}" fromLane="{a}" toLane="{b}" dir="s" state="M"/>')
    return "\n".join([*parts, "</net>"])


def _routes_xml(seconds: float) -> str:
    """Poisson flows of each kind of driver on each way through."""
    flows = {
        "through": ("up weave down", weave.ROAD_FLOW * (1 - weave.EXITS)),
        "leave": ("up weave off", weave.ROAD_FLOW * weave.EXITS),
        "join": ("on weave down", weave.RAMP_FLOW),
    }
    parts = ["<routes>"]
    for kind, (_, length, width, driver) in _TYPES.items():
        parts.append(f'<vType id="{kind}" length="{length}" width="{width}" {driver}/>')
    parts += [f'<route id="{name}" edges="{edges}"/>' for name, (edges, _) in flows.items()]
    for name, (_, flow) in flows.items():
        for kind, about in _TYPES.items():
            parts.append(
                f'<flow id="{name}_{kind}" type="{kind}" route="{name}" begin="0" end="{seconds}"'
                f' period="exp({flow * about[0] / 3600:.6f})" departLane="best" departSpeed="max" departPos="0"/>'
            )
    return "\n".join([*parts, "</routes>"])
