//! The report: the machine and the figures, as a table for people and as JSON for programs.

use std::fs;
use std::path::{Path, PathBuf};

use bollard::Docker;
use serde_json::{Value, json};

use crate::Result;
use crate::figures::{Figures, Ratio, Row};

/// Where it was measured.
pub struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    engine: String,
    load_before: String,
}

impl Machine {
    /// Looks at this machine; its load is that of now.
    pub async fn observe(docker: &Docker) -> Result<Self> {
        let engine = docker.version().await?.version.unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            cpu: model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, model)| model.to_owned()),
            cores: std::thread::available_parallelism()?.get(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            engine,
            load_before: load(),
        })
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Load averages of 1, 5 and 15 minutes.
fn load() -> String {
    read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// Prints the table, writes the JSON, and says where.
pub fn tell(machine: &Machine, figures: &Figures) -> Result<()> {
    let load_after = load();
    println!("\n{}, {} cores; Linux {}; Docker {}", machine.cpu, machine.cores, machine.kernel, machine.engine);
    println!("load average before {}, after {load_after}\n", machine.load_before);
    println!("{:<58} {:>4} {:>9} {:>9} {:>9} {:>9}", "", "n", "median", "p10", "p90", "p99");
    figures.rows.iter().for_each(print_row);
    println!();
    figures.ratios.iter().for_each(print_ratio);
    let path = write(machine, &load_after, figures.to_json())?;
    println!("\n{}", path.display());
    Ok(())
}

fn print_row(row: &Row) {
    let [median, p10, p90, p99] = [0.5, 0.1, 0.9, 0.99].map(|at| row.quantile(at));
    println!("{:<58} {:>4} {median:>9.2} {p10:>9.2} {p90:>9.2} {p99:>9.2} {}", row.name, row.count(), row.unit);
}

fn print_ratio(ratio: &Ratio) {
    let verdict = match ratio.target {
        None => String::new(),
        Some(target) if ratio.is_missed() => format!("  MISSED (target: at most {target:.2})"),
        Some(target) => format!("  met (target: at most {target:.2})"),
    };
    println!("ratio {:<58} {:>6.3}{verdict}", ratio.name, ratio.value);
}

fn write(machine: &Machine, load_after: &str, mut report: Value) -> Result<PathBuf> {
    report["machine"] = json!({"cpu": machine.cpu, "cores": machine.cores, "kernel": machine.kernel,
        "engine": machine.engine, "load_before": machine.load_before, "load_after": load_after});
    // Beside the folder of the profile, wherever that is.
    let target = Path::new(env!("CARGO_BIN_EXE_cellblock")).ancestors().nth(2).ok_or("no target folder")?;
    let path = target.join("bench/compare.json");
    fs::create_dir_all(target.join("bench"))?;
    fs::write(&path, serde_json::to_vec_pretty(&report)?)?;
    Ok(path)
}
