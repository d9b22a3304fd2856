//! What a guest says that an execution has done, as the domain has it. Everything in it is hostile text within bounds.

use std::time::Duration;

use cellblock_wire::link;

use crate::domain::output::{Change, Effects, FileChange, Process};

/// Most files and processes that are taken over; the guest tells fewer.
const MAX_ENTRIES: usize = 512;
/// Longest path or command line, in bytes.
const MAX_TEXT: usize = 4096;

/// Takes over what a guest says.
pub(super) fn read(told: link::Effects) -> Effects {
    let files_over = told.files.len().saturating_sub(MAX_ENTRIES) as u64;
    let processes_over = told.processes.len().saturating_sub(MAX_ENTRIES) as u64;
    Effects {
        files: told.files.into_iter().take(MAX_ENTRIES).filter(|f| f.path.len() <= MAX_TEXT).map(file).collect(),
        files_omitted: told.files_omitted.saturating_add(files_over),
        processes: told.processes.into_iter().take(MAX_ENTRIES).map(process).collect(),
        processes_omitted: told.processes_omitted.saturating_add(processes_over),
        cpu: told.cpu_usec.map(Duration::from_micros),
        peak_memory_bytes: told.peak_memory_bytes,
        approximate: told.approximate,
        pids_hit: told.pids_hit,
        disk_hit: told.disk_hit,
        memory_hit: told.memory_hit,
    }
}

fn file(told: link::FileChange) -> FileChange {
    let is_hash = |hash: &String| hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    FileChange {
        path: told.path,
        change: match told.change {
            link::Change::Created => Change::Created,
            link::Change::Changed => Change::Changed,
            link::Change::Deleted => Change::Deleted,
        },
        bytes: told.size_bytes,
        sha256: told.sha256.filter(is_hash),
    }
}

fn process(told: link::Process) -> Process {
    let mut command = told.command;
    command.truncate(command.floor_char_boundary(MAX_TEXT));
    Process { pid: told.pid, command }
}
