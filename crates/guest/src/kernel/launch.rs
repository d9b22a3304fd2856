//! Starts a kernel's process from its kernelspec. Speaks to no channel and ends nothing.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::Permissions;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};

use cellblock_wire::link::Transport;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, chmodat, open, openat, renameat, unlinkat};
use tokio::net::TcpSocket;

use super::spec::FoundSpec;
use super::tree::{MARK, Tree};
use crate::message::Signer;

/// Longest path of a unix socket, without its closing zero.
const MAX_SOCKET_PATH: usize = 107;
/// Most names of one folder that [`clear`] takes at once, and the most folders inside each other.
const MAX_LITTER: usize = 10_000;
const MAX_DEPTH: usize = 1000;
const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Where one of a kernel's five ports is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A port of the loopback.
    Tcp(u16),
}

/// A kernel's private folder, removed when dropped.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// What stands in the environment of the kernel that this is the folder of.
    fn mark(&self) -> &OsStr {
        self.0.as_os_str()
    }

    /// Makes a folder that was not there before and is closed to others.
    ///
    /// # Errors
    /// When it can't be made, or stands there already.
    pub fn create(parent: &Path, name: &str) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        let folder = parent.join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What is needed to start a kernel.
pub struct Launch<'a> {
    /// The kernel's name.
    pub kernel: &'a str,
    /// Its kernelspec.
    pub spec: &'a FoundSpec,
    /// How it is to be reached.
    pub transport: Transport,
    /// Added to the guest's own environment, later ones last.
    pub env: [&'a BTreeMap<String, String>; 3],
    /// Working folder.
    pub cwd: &'a Path,
    /// The folder of the kernels' folders.
    pub state: &'a Path,
    /// Our launcher for `ipykernel`, used if it is there.
    pub launcher: &'a Path,
}

/// A kernel's running process.
pub struct Launched {
    /// Its processes.
    pub tree: Tree,
    /// What it complains.
    pub stderr: Option<ChildStderr>,
    /// Shell, iopub, stdin, control, heartbeat.
    pub endpoints: [Endpoint; 5],
    /// Signs with its key.
    pub signer: Signer,
    /// Its folder.
    pub folder: Folder,
    /// Keep its ports for it, if it has any.
    _reserved: Vec<TcpSocket>,
}

impl Launch<'_> {
    /// Starts the process, leader of its own group.
    ///
    /// # Errors
    /// When its folder, its ports or its process can't be made.
    pub fn start(&self) -> io::Result<Launched> {
        let folder = Folder::create(self.state, self.kernel)?;
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(|_| io::Error::other("no random numbers"))?;
        let key: String = key.iter().map(|b| format!("{b:02x}")).collect();
        let (ip, ports, reserved) = self.ports(&folder)?;
        let file = folder.0.join("connection.json");
        self.write_connection_file(&file, &ip, &ports, &key)?;
        let mut child = self.command(&file, &folder).spawn()?;
        let stderr = child.stderr.take();
        let pid = child.id() as i32;
        // Of all processes in the cell the kernel is the first to go when memory runs out, and the guest the last.
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "1000");
        let endpoints = ports.map(|port| match self.transport {
            Transport::Ipc => Endpoint::Unix(format!("{ip}-{port}").into()),
            Transport::Tcp => Endpoint::Tcp(port),
        });
        let tree = Tree::new(pid, folder.mark());
        Ok(Launched { tree, stderr, endpoints, signer: Signer::new(key.as_bytes()), folder, _reserved: reserved })
    }

    fn ports(&self, folder: &Folder) -> io::Result<(String, [u16; 5], Vec<TcpSocket>)> {
        if self.transport == Transport::Tcp {
            let (ports, reserved) = reserve_ports()?;
            return Ok((Ipv4Addr::LOCALHOST.to_string(), ports, reserved));
        }
        match folder.0.join("k").into_os_string().into_string() {
            Ok(ip) if ip.len() + 2 <= MAX_SOCKET_PATH => Ok((ip, [1, 2, 3, 4, 5], Vec::new())),
            _ => Err(io::Error::other("the kernel's folder is too long for a socket's path")),
        }
    }

    fn write_connection_file(&self, path: &Path, ip: &str, ports: &[u16; 5], key: &str) -> io::Result<()> {
        let [shell, iopub, stdin, control, heartbeat] = ports;
        let content = serde_json::json!({
            "transport": self.transport, "ip": ip, "key": key, "signature_scheme": "hmac-sha256", "kernel_name": self.spec.name,
            "shell_port": shell, "iopub_port": iopub, "stdin_port": stdin, "control_port": control, "hb_port": heartbeat,
        });
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(content.to_string().as_bytes())
    }

    fn command(&self, connection_file: &Path, folder: &Folder) -> Command {
        let launcher = self.launcher.is_file().then_some(self.launcher);
        let argv = command_line(&self.spec.json.argv, connection_file, &self.spec.folder, launcher);
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).current_dir(self.cwd).process_group(0);
        self.env.iter().for_each(|env| {
            command.envs(env.iter().filter(|(name, value)| is_env(name) && !value.contains('\0')));
        });
        command.env(MARK, folder.mark());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }
}

/// Whether an environment can have a variable of this name.
pub fn is_env(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0'])
}

/// Five free ports, and the sockets that keep them so: the machine gives a bound port to nobody who asks for any, and one that was bound
/// with `SO_REUSEADDR`, and does not listen, to whoever asks for it likewise, as ZeroMQ does (`socket(7)`).
fn reserve_ports() -> io::Result<([u16; 5], Vec<TcpSocket>)> {
    let reserve = |_| {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        Ok(socket)
    };
    let reserved: Vec<TcpSocket> = (0..5).map(reserve).collect::<io::Result<_>>()?;
    let mut ports = [0; 5];
    for (port, socket) in ports.iter_mut().zip(&reserved) {
        *port = socket.local_addr()?.port();
    }
    Ok((ports, reserved))
}

/// A kernelspec's command with its places filled in, and `ipykernel` started by our launcher if there is one.
fn command_line(argv: &[String], connection_file: &Path, folder: &Path, launcher: Option<&Path>) -> Vec<String> {
    let fill = |arg: &String| {
        arg.replace("{connection_file}", &connection_file.to_string_lossy())
            .replace("{resource_dir}", &folder.to_string_lossy())
    };
    let mut argv: Vec<String> = argv.iter().map(fill).collect();
    // As jupyter_client does: a bare `python` is the one that the kernelspec was installed for.
    if matches!(argv[0].as_str(), "python" | "python3")
        && let Some(own) =
            folder.ancestors().nth(4).map(|prefix| prefix.join("bin").join(&argv[0])).filter(|own| own.is_file())
    {
        argv[0] = own.to_string_lossy().into_owned();
    }
    let module = argv
        .windows(2)
        .position(|pair| pair[0] == "-m" && matches!(pair[1].as_str(), "ipykernel_launcher" | "ipykernel"));
    if let (Some(at), Some(launcher)) = (module, launcher) {
        argv.splice(at..at + 2, [launcher.to_string_lossy().into_owned()]);
        // Without a debugger there is nothing that frozen modules could disturb, and they start faster.
        argv.retain(|arg| arg != "-Xfrozen_modules=off");
        if let Some(at) = argv.windows(2).position(|pair| pair == ["-X", "frozen_modules=off"]) {
            argv.drain(at..at + 2);
        }
    }
    argv
}

/// Gives folders back to their owner: code may have closed them to itself, and no kernel starts without.
pub fn reopen(folders: &[PathBuf]) {
    for folder in folders {
        let is_closed = |found: std::fs::Metadata| found.permissions().mode() & 0o700 != 0o700;
        if std::fs::metadata(folder).is_ok_and(is_closed) {
            // What is not ours can't be changed, and was not closed by the code.
            let _ = std::fs::set_permissions(folder, Permissions::from_mode(0o700));
        }
    }
}

/// Empties the folder of the kernels' folders, but for those whose names are kept: code of the same uid can fill it, and close it.
pub fn clear(state: &Path, keep: impl Fn(&OsStr) -> bool) {
    // It may not be there yet, and what can't be removed is told by the start that finds no room.
    let _ = std::fs::set_permissions(state, Permissions::from_mode(0o700));
    for round in 0..MAX_DEPTH {
        let Ok(root) = open(state, FOLDER, Mode::empty()) else { return };
        let litter: Vec<OsString> = names_in(&root).into_iter().filter(|name| !keep(name)).collect();
        if litter.is_empty() {
            return;
        }
        for (number, name) in litter.iter().enumerate() {
            remove_or_flatten(&root, name, &format!(".litter-{round}-{number}"));
        }
    }
}

fn names_in(folder: &OwnedFd) -> Vec<OsString> {
    let entries = Dir::read_from(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
    names.filter(|name| name != "." && name != "..").take(MAX_LITTER).collect()
}

/// Removes a file, or a folder's files and the folder; folders in it are moved up, so that no depth is too deep.
fn remove_or_flatten(root: &OwnedFd, name: &OsStr, up: &str) {
    if unlinkat(root, name, AtFlags::empty()).is_ok() {
        return;
    }
    let _ = chmodat(root, name, Mode::RWXU, AtFlags::empty());
    let Ok(folder) = openat(root, name, FOLDER, Mode::empty()) else { return };
    for (number, inner) in names_in(&folder).into_iter().enumerate() {
        if unlinkat(&folder, &inner, AtFlags::empty()).is_err() {
            let _ = chmodat(&folder, &inner, Mode::RWXU, AtFlags::empty());
            let _ = renameat(&folder, &inner, root, format!("{up}-{number}"));
        }
    }
    let _ = unlinkat(root, name, AtFlags::REMOVEDIR);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(argv: &[&str], launcher: Option<&str>) -> Vec<String> {
        let argv: Vec<String> = argv.iter().map(|s| (*s).to_owned()).collect();
        command_line(&argv, Path::new("/c.json"), Path::new("/spec"), launcher.map(Path::new))
    }

    #[test]
    fn ipykernel_is_started_by_our_launcher_and_others_as_they_say() {
        let stock = ["python", "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"];
        assert_eq!(line(&stock, Some("/l.py")), ["python", "/l.py", "-f", "/c.json"]);
        assert_eq!(line(&stock, None)[1..4], ["-Xfrozen_modules=off", "-m", "ipykernel_launcher"]);
        assert_eq!(line(&["R", "--x={resource_dir}/a"], Some("/l.py")), ["R", "--x=/spec/a"]);
        assert_eq!(line(&["p", "-X", "frozen_modules=off", "-m", "ipykernel"], Some("/l.py")), ["p", "/l.py"]);
    }

    #[test]
    fn closed_folders_are_opened_again() {
        let folder = std::env::temp_dir().join(format!("cellblock-reopen-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (mode, expected) in [(0, 0o700), (0o755, 0o755)] {
            std::fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
            reopen(&[folder.clone(), PathBuf::from("/nonexistent")]);
            assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, expected);
        }
        std::fs::remove_dir(folder).unwrap();
    }

    #[test]
    fn reserved_ports_differ_and_go_to_whoever_names_them() {
        let (ports, _reserved) = reserve_ports().unwrap();
        assert_eq!(ports.iter().collect::<std::collections::BTreeSet<_>>().len(), 5);
        for port in ports {
            std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        }
    }
}
