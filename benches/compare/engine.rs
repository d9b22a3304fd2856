//! The other side of each comparison: containers of the same image without Cellblock, made by `docker run` or by the engine's API.
//!
//! Also removes everything that the bench leaves on the engine, on every way out.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bollard::Docker;
use bollard::container::{AttachContainerResults, LogOutput};
use bollard::models::{ContainerCreateBody, ContainerInspectResponse, HostConfig};
use bollard::query_parameters::{AttachContainerOptionsBuilder, RemoveContainerOptionsBuilder};
use futures_util::{Stream, StreamExt};
use serde_json::Value;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::{IMAGE, INSTANCE, Result};

/// On every container of the bench that isn't the server's.
const LABEL: &str = "io.cellblock.bench";
/// On everything of the server's.
const INSTANCE_LABEL: &str = "io.cellblock.instance";
const SCRIPT: &str = include_str!("stock.py");
const ANSWER: Duration = Duration::from_secs(120);

type Output = Pin<Box<dyn Stream<Item = std::result::Result<LogOutput, bollard::errors::Error>> + Send>>;

/// The engine. What the bench made there is removed when this is dropped.
pub struct Engine {
    pub docker: Docker,
}

impl Engine {
    /// Connects as the `docker` command does, and removes what a bench that was killed has left.
    pub async fn connect() -> Result<Self> {
        let docker = Docker::connect_with_defaults()?.negotiate_version().await?;
        remove_leftovers();
        Ok(Self { docker })
    }

    /// Everything the engine says of a session's container.
    pub async fn inspect(&self, session: &str) -> Result<ContainerInspectResponse> {
        Ok(self.docker.inspect_container(&format!("cellblock-{INSTANCE}-{session}-1"), None).await?)
    }

    /// A container without a network that runs the script, through the API: no more than create, attach, start.
    pub async fn plain(&self, mode: &str) -> Result<Inside> {
        let isolated = HostConfig { network_mode: Some("none".to_owned()), ..HostConfig::default() };
        let body = ContainerCreateBody {
            image: Some(IMAGE.to_owned()),
            env: Some(vec!["HOME=/workspace".to_owned()]),
            host_config: Some(isolated),
            ..ContainerCreateBody::default()
        };
        Inside::start(self.docker.clone(), body, command(mode)).await
    }

    /// A container that is limited and locked exactly as the session's is, and runs the script instead of our guest.
    pub async fn like(&self, session: &str, mode: &str) -> Result<Inside> {
        let cell = self.inspect(session).await?;
        let config = cell.config.ok_or("a container without a configuration")?;
        let body = ContainerCreateBody {
            image: config.image,
            env: config.env,
            user: config.user,
            working_dir: config.working_dir,
            network_disabled: config.network_disabled,
            // Replaced, and not the image's: the session's is our guest.
            entrypoint: Some(vec![]),
            host_config: cell.host_config,
            ..ContainerCreateBody::default()
        };
        Inside::start(self.docker.clone(), body, command(mode)).await
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        remove_leftovers();
    }
}

fn command(mode: &str) -> Vec<String> {
    ["python", "-c", SCRIPT, mode].map(str::to_owned).to_vec()
}

/// Through the command line, since a drop can't wait for the API.
fn remove_leftovers() {
    for label in [LABEL.to_owned(), format!("{INSTANCE_LABEL}={INSTANCE}")] {
        remove_all(&["ps", "--all", "--quiet"], &["rm", "--force", "--volumes"], &label);
    }
    remove_all(&["volume", "ls", "--quiet"], &["volume", "rm"], &format!("{INSTANCE_LABEL}={INSTANCE}"));
}

fn remove_all(list: &[&str], remove: &[&str], label: &str) {
    let listed = Command::new("docker").args(list).args(["--filter", &format!("label={label}")]).output();
    let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    if !listed.trim().is_empty() {
        // What is gone already is an error that does not matter.
        let _ = Command::new("docker").args(remove).args(listed.split_whitespace()).output();
    }
}

/// `docker run` of the image with its stock kernel, until that has answered. The container is gone afterwards.
pub fn docker_run(flags: &[&str]) -> Result<Duration> {
    let started = Instant::now();
    let mut process = Command::new("docker")
        .args(["run", "--interactive", "--rm", "--label", LABEL, "--env", "HOME=/workspace"])
        .args(flags)
        .arg(IMAGE)
        .args(command("start"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Where a kernel says that it speaks TCP.
        .stderr(Stdio::null())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(process.stdout.take().ok_or("no stdout")?).read_line(&mut line)?;
    let elapsed = started.elapsed();
    drop(process.stdin.take());
    let status = process.wait()?;
    if line.trim() != "answered" || !status.success() {
        return Err(format!("docker run ended with {status} and said {line:?}").into());
    }
    Ok(elapsed)
}

/// A running container that reads and writes lines.
pub struct Inside {
    docker: Docker,
    id: String,
    input: Pin<Box<dyn AsyncWrite + Send>>,
    output: Output,
    unread: Vec<u8>,
}

impl Inside {
    /// Runs `command` in a container that is otherwise made from `body`.
    pub async fn start(docker: Docker, body: ContainerCreateBody, command: Vec<String>) -> Result<Self> {
        let body = ContainerCreateBody {
            cmd: Some(command),
            labels: Some(HashMap::from([(LABEL.to_owned(), String::new())])),
            open_stdin: Some(true),
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            ..body
        };
        let id = docker.create_container(None, body).await?.id;
        let options = AttachContainerOptionsBuilder::default().stream(true).stdin(true).stdout(true).build();
        let AttachContainerResults { output, input } = docker.attach_container(&id, Some(options)).await?;
        docker.start_container(&id, None).await?;
        Ok(Self { docker, id, input, output, unread: Vec::new() })
    }

    /// Sends a line.
    pub async fn order(&mut self, order: &Value) -> Result<()> {
        self.input.write_all(format!("{order}\n").as_bytes()).await?;
        Ok(self.input.flush().await?)
    }

    /// Sends so many bytes, or, of none, an empty line.
    pub async fn send(&mut self, bytes: usize) -> Result<()> {
        let (piece, mut left) = (vec![b'x'; 256 << 10], bytes);
        while left > 0 {
            let part = left.min(piece.len());
            self.input.write_all(&piece[..part]).await?;
            left -= part;
        }
        if bytes == 0 {
            self.input.write_all(b"\n").await?;
        }
        Ok(self.input.flush().await?)
    }

    /// The next line.
    pub async fn line(&mut self) -> Result<String> {
        let answer = async {
            loop {
                if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                    return Ok(String::from_utf8_lossy(&self.unread.drain(..=end).collect::<Vec<_>>()).into_owned());
                }
                let chunk = self.chunk().await?.ok_or("the container's output ended")?;
                self.unread.extend_from_slice(&chunk);
            }
        };
        tokio::time::timeout(ANSWER, answer).await?
    }

    /// Output as it comes; nothing at its end.
    pub async fn chunk(&mut self) -> Result<Option<bytes::Bytes>> {
        Ok(self.output.next().await.transpose()?.map(LogOutput::into_bytes))
    }

    /// Sends a line and reads the answer's seconds.
    pub async fn ask<T: serde::de::DeserializeOwned>(&mut self, order: &Value) -> Result<T> {
        self.order(order).await?;
        Ok(serde_json::from_str(&self.line().await?)?)
    }

    /// Removes it.
    pub async fn end(self) -> Result<()> {
        let Self { docker, id, input, output, .. } = self;
        drop((input, output));
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        Ok(docker.remove_container(&id, Some(options)).await?)
    }
}
