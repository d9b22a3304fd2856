//! Terminals: their two ends, and how a program gets one as its controlling terminal.
//!
//! That takes two system calls between fork and exec, where only `unsafe` could put them. So the guest starts itself in the mode of [`PROGRAM`]
//! instead: it makes its stdin its controlling terminal and becomes the program.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use cellblock_wire::commands::Size;
use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// The guest's first argument in this mode; the program and its arguments follow.
pub const PROGRAM: &str = "--in-terminal";
/// What shells answer when a program can't be started.
const NOT_STARTED: u8 = 127;

/// A terminal: our end, and the program's.
pub struct Terminal {
    /// What is written here is typed; what is read was shown.
    pub ours: OwnedFd,
    /// The program's stdin, stdout and stderr.
    pub theirs: OwnedFd,
}

impl Terminal {
    /// Opens one of this size.
    ///
    /// # Errors
    /// When there are as many as may be.
    pub fn open(size: Size) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let theirs = ioctl_tiocgptpeer(&ours, flags)?;
        resize(&ours, size)?;
        Ok(Self { ours, theirs })
    }
}

/// Gives a terminal another size, which its foreground processes are told.
///
/// # Errors
/// When it is gone.
pub fn resize(ours: &OwnedFd, Size { cols, rows }: Size) -> io::Result<()> {
    Ok(tcsetwinsize(ours, Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 })?)
}

/// Makes stdin the controlling terminal of a new session, and becomes the program. Comes back only if that can't be.
#[must_use]
pub fn become_program(argv: &[OsString]) -> ExitCode {
    let Some((program, arguments)) = argv.split_first() else { return ExitCode::from(NOT_STARTED) };
    let taken = setsid().and_then(|_| ioctl_tiocsctty(rustix::stdio::stdin()));
    let error = match taken {
        Ok(()) => Command::new(program).args(arguments).exec(),
        Err(errno) => errno.into(),
    };
    eprintln!("{}: {error}", program.to_string_lossy());
    ExitCode::from(NOT_STARTED)
}
