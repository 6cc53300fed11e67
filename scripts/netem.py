"""The network of scripts/netem: one TUN device for each host, and this program as the wire between them.

Called as `netem.py <name of the namespaces> <seconds>`. Prints `ready`, and at SIGINT what became of the packets.
"""

import fcntl
import heapq
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time

HOSTS = {"server": 1, "one": 2, "two": 3}
DELAY, JITTER, LOSS = 0.002, 0.003, 0.01
# A partition begins each so often, and lasts so long. None in the last seconds, so that all can agree again.
EACH, LASTS, QUIET = 6.0, 2.0, 5.0

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def device(name, host, number):
    """Makes a device, and gives its far end to the host."""
    link = f"wf{os.getpid() % 10000}n{number}"
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", link.encode(), IFF_TUN | IFF_NO_PI))
    namespace = f"{name}-{host}"
    for command in (
        ["ip", "link", "set", link, "netns", namespace],
        ["ip", "-n", namespace, "addr", "add", f"10.77.0.{number}/24", "dev", link],
        ["ip", "-n", namespace, "link", "set", link, "up"],
    ):
        subprocess.run(command, check=True)
    return end


def cut(elapsed, seconds):
    """Returns which ways, from host to host, are cut at that moment."""
    number, phase = divmod(elapsed, EACH)
    if phase < EACH - LASTS or elapsed > seconds - QUIET:
        return set()
    ways = [
        {(2, 1), (1, 2)},  # a worker is cut off
        {(3, 1), (1, 3)},
        {(2, 1), (1, 2), (3, 1), (1, 3)},  # the server is
        {(1, 2)},  # a worker is heard and hears nothing: its writes take effect, unanswered
        {(3, 1)},  # a worker hears and is not heard
    ]
    return ways[int(number) % len(ways)]


def main():
    name, seconds = sys.argv[1], float(sys.argv[2])
    ends = {number: device(name, host, number) for host, number in HOSTS.items()}
    host_of = {end: number for number, end in ends.items()}
    is_over = []
    signal.signal(signal.SIGINT, lambda *_: is_over.append(True))
    print("ready", flush=True)
    counts = {"carried": 0, "lost": 0, "cut": 0, "overtaken": 0}
    queue, sequence, start, latest, partitions = [], 0, time.monotonic(), {}, set()
    while not is_over:
        now = time.monotonic()
        while queue and queue[0][0] <= now:
            _, number, to, way, packet = heapq.heappop(queue)
            counts["overtaken"] += number < latest.get(way, 0)
            latest[way] = max(number, latest.get(way, 0))
            try:
                os.write(ends[to], packet)
                counts["carried"] += 1
            except OSError:
                counts["lost"] += 1
        wait = max(0.0, min(0.1, queue[0][0] - now)) if queue else 0.1
        for end in select.select(list(host_of), [], [], wait)[0]:
            for _ in range(64):
                try:
                    packet = os.read(end, 65536)
                except BlockingIOError:
                    break
                if len(packet) < 20 or packet[0] >> 4 != 4 or packet[16:19] != b"\x0a\x4d\x00":
                    continue  # IPv6 looks for neighbours
                way = (host_of[end], packet[19])
                elapsed = time.monotonic() - start
                ways = cut(elapsed, seconds)
                if ways:
                    partitions.add(int(elapsed // EACH))
                if way[1] not in ends or way in ways:
                    counts["cut"] += 1
                elif random.random() < LOSS:
                    counts["lost"] += 1
                else:
                    sequence += 1
                    at = time.monotonic() + DELAY + random.random() * JITTER
                    heapq.heappush(queue, (at, sequence, way[1], way, packet))
    print(f"{len(partitions)} partitions; packets:", ", ".join(f"{count} {what}" for what, count in counts.items()))


main()
