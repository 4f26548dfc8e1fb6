"""Runs ncu on a pass: the time of every kernel, and what limits the slowest ones."""
import csv
import re
import subprocess

from steps import table

# The metrics shown, by ncu's names, and their names here.
SHOWN = {
    "Duration": "ms", "Compute (SM) Throughput": "compute", "Memory Throughput": "memory", "DRAM Throughput": "DRAM",
    "L2 Cache Throughput": "L2", "Achieved Occupancy": "occupancy", "Registers Per Thread": "registers",
    "Warp Cycles Per Issued Instruction": "cycles an instruction",
}
SECTIONS = ["SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats"]
# Milliseconds per unit of time, by the names that different versions of ncu use.
MILLISECONDS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1, "msecond": 1, "s": 1e3, "second": 1e3}
# The most launches measured in detail; each is repeated several times for its metrics.
MOST_LAUNCHES = 60


def command(log, *options):
    """The ncu command that profiles from cuProfilerStart to cuProfilerStop and writes CSV, with mangled (unique) kernel names.

    Clocks and caches are left as in a pass without a profiler.
    """
    return ["ncu", "--csv", "--log-file", log, "--target-processes", "all", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none", "--print-units", "base",
            "--kernel-name-base", "mangled", "--print-kernel-base", "mangled", *options]


def timing(log):
    return command(log, "--metrics", "gpu__time_duration.sum")


def details(log, names, launches):
    """The ncu command for the sections of enough launches that each of `names` occurs; `launches` has the kernels in order."""
    pattern = "regex:^(" + "|".join(map(re.escape, names)) + ")$"
    matching = [name for name, _ in launches if name in names]
    enough = max(matching.index(name) for name in names) + 1
    sections = [part for section in SECTIONS for part in ("--section", section)]
    return command(log, *sections, "--kernel-name", pattern, "--launch-count", str(min(enough, MOST_LAUNCHES)))


def rows(log):
    """The rows of a log as dictionaries, without ncu's other messages."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith('"')]
    return list(csv.DictReader(lines))


def milliseconds(row):
    """The time in a row's metric."""
    return float(row["Metric Value"].replace(",", "")) * MILLISECONDS[row["Metric Unit"]]


def launches(log):
    """(kernel, milliseconds) of every launch, in order."""
    found = []
    for row in rows(log):
        if row["Metric Name"] == "gpu__time_duration.sum":
            found.append((row["Kernel Name"], milliseconds(row)))
    if not found:
        raise ValueError("ncu saw no kernel")
    return found


def by_kernel(found):
    """(kernel, launches, milliseconds in all), the slowest first."""
    totals = {}
    for name, time in found:
        count, total = totals.get(name, (0, 0.0))
        totals[name] = (count + 1, total + time)
    return sorted(((name, count, total) for name, (count, total) in totals.items()), key=lambda row: -row[2])


def kernel_table(found, most=30):
    """The kernels of a pass, the slowest first."""
    kernels = by_kernel(found)
    whole = sum(total for _, _, total in kernels)
    readable = demangled([name for name, _, _ in kernels])
    shown = [[total, f"{100 * total / whole:.1f} %", count, short(name)] for name, (_, count, total) in zip(readable, kernels)]
    rest = shown[most:]
    text = table(["ms", "share", "launches", "kernel"], shown[:most])
    text += f"\n{sum(count for _, count, _ in kernels)} launches, {whole:.3g} ms in all"
    return text + (f"; {len(rest)} other kernels take {sum(row[0] for row in rest):.3g} ms.\n" if rest else ".\n")


def details_table(log, names=()):
    """What limits each kernel, by the longest of its measured launches."""
    of_launch, stalls = {}, {}
    for row in rows(log):
        key = (row["Kernel Name"], row["ID"])
        metric = row.get("Metric Name")
        if metric == "Duration":
            of_launch.setdefault(key, {})[metric] = milliseconds(row)
        elif metric in SHOWN:
            percent = " %" if row["Metric Unit"] == "%" else ""
            of_launch.setdefault(key, {})[metric] = row["Metric Value"] + percent
        if row.get("Rule Name") == "CPIStall" and row.get("Rule Description"):
            stalls[key] = row["Rule Description"]
    if not of_launch:
        raise ValueError("ncu showed no metric")
    longest = {}
    for key, metrics in of_launch.items():
        duration = metrics.get("Duration", 0.0)
        if duration >= longest.get(key[0], (-1, None))[0]:
            longest[key[0]] = (duration, key)
    keys = [key for _, key in sorted(longest.values(), reverse=True)]
    names = demangled([name for name, _ in keys])
    shown = [[short(name), *[of_launch[key].get(metric) for metric in SHOWN]] for name, key in zip(names, keys)]
    text = table(["kernel", *SHOWN.values()], shown)
    for name, key in zip(names, keys):
        if key in stalls:
            text += f"\n- {short(name, 60)}: {stalls[key]}"
    missing = [name for name in names if name not in longest]
    if missing:
        text += f"\n- not among the measured launches: {', '.join(short(name, 60) for name in demangled(missing))}"
    return text + f"\n\nThe longest among the first {len(of_launch)} launches of these kernels.\n"


def demangled(names):
    """The demangled names, if c++filt is installed."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    except OSError:
        return names
    readable = done.stdout.splitlines()
    return readable if len(readable) == len(names) else names


def short(name, most=110):
    return name if len(name) <= most else name[: most - 1] + "…"
