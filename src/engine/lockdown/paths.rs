//! Paths of /proc and /sys that code inside can't read or can't write. Only lists.

/// What engines mask by themselves. Giving a list replaces theirs, so it is repeated here.
const MASKED_BY_DEFAULT: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/sys/devices/system/cpu/cpu0/thermal_throttle",
];

/// What tells about the machine: its kernel's configuration and addresses, its devices, what its other users do.
/// `cpuinfo`, `meminfo`, `stat`, `uptime`, `loadavg` and `/sys/devices/system/cpu` stay: libraries size themselves by them.
const MASKED_MACHINE: [&str; 30] = [
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/config.gz",
    "/proc/cmdline",
    "/proc/key-users",
    "/proc/diskstats",
    "/proc/partitions",
    "/proc/swaps",
    "/proc/buddyinfo",
    "/proc/slabinfo",
    "/proc/vmallocinfo",
    "/proc/iomem",
    "/proc/modules",
    "/proc/fs",
    "/proc/driver",
    "/proc/bus",
    "/proc/irq",
    "/proc/pressure",
    "/proc/kmsg",
    "/proc/softirqs",
    "/sys/kernel",
    "/sys/block",
    "/sys/module",
    "/sys/power",
    "/sys/hypervisor",
    "/sys/bus",
    "/sys/class/dmi",
    "/sys/class/block",
    "/sys/devices/virtual/dmi",
    "/sys/devices/virtual/block",
];

/// What would change the machine if it were written. The others of an engine's own list are masked altogether.
const READ_ONLY: [&str; 2] = ["/proc/sys", "/proc/sysrq-trigger"];

/// Paths that show nothing. A path that the machine has not is no error.
pub(super) fn masked() -> Vec<String> {
    MASKED_BY_DEFAULT.iter().chain(&MASKED_MACHINE).map(ToString::to_string).collect()
}

/// Paths that can be read and not written.
pub(super) fn read_only() -> Vec<String> {
    READ_ONLY.map(str::to_owned).to_vec()
}
