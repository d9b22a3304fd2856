//! Jupyter's clients as they come from the registry: through the Jupyter door, through Jupyter Kernel Gateway, and beside a kernel of this machine's, in turns.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use tokio::task::block_in_place;

use crate::Result;
use crate::figures::Figures;
use crate::measure::{say, shuffled};
use crate::server::Server;

/// What the server has: a pool, since a start from one is measured, and a default template with Python.
pub const SETTINGS: &str = "default_template = \"python\"\n[templates.python.pool]\nmin = 2\nmax = 2\n";
const BLOCKS: usize = 15;
const BLOCK: usize = 20;
const WARM_UP: usize = 30;
const STARTS: usize = 20;
/// Seconds: what is made for the pool has just ended, and its last traces settle.
const SETTLE: f64 = 0.05;
const SIDES: [&str; 3] = ["cellblock", "gateway", "direct"];
const MS: &str = "ms";

/// The program with the clients. It ends with its orders, however this ends.
struct Clients {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Clients {
    fn start(server: &Server) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join("target/gateway/bin/python");
        if !python.exists() {
            return Err(format!("{} is not there; `scripts/test-kernel bench` makes it", python.display()).into());
        }
        let mut command = Command::new(python);
        // Without the script's folder among the modules.
        command.arg("-P").arg(root.join("benches/compare/jupyter.py")).args([server.url(), server.key()]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (orders, answers) = (process.stdin.take().ok_or("no stdin")?, process.stdout.take().ok_or("no stdout")?);
        Ok(Self { process, orders, answers: BufReader::new(answers) })
    }

    fn ask(&mut self, order: &Value) -> Result<Vec<f64>> {
        block_in_place(|| {
            writeln!(self.orders, "{order}")?;
            let mut line = String::new();
            self.answers.read_line(&mut line)?;
            serde_json::from_str(&line).map_err(|_| format!("the clients said {line:?} to {order}").into())
        })
    }

    fn end(self) -> Result<()> {
        let Self { mut process, orders, answers } = self;
        drop((orders, answers));
        block_in_place(|| process.wait())?;
        Ok(())
    }
}

/// The round trip of `1+1`, and from the request for a kernel until it answers.
pub async fn jupyter(server: &Server, figures: &mut Figures) -> Result<()> {
    say("Jupyter's clients");
    let mut clients = Clients::start(server)?;
    for side in SIDES {
        clients.ask(&json!({"rounds": WARM_UP, "side": side}))?;
    }
    let mut found = [const { Vec::new() }; 3];
    for _ in 0..BLOCKS {
        for place in shuffled([0, 1, 2])? {
            found[place].extend(clients.ask(&json!({"rounds": BLOCK, "side": SIDES[place]}))?);
        }
    }
    let mut starts = [const { Vec::new() }; 3];
    for round in 0..=STARTS {
        for place in shuffled([0, 1, 2])? {
            server.pool_is_full().await?;
            clients.ask(&json!({"idle": SETTLE}))?;
            let took = clients.ask(&json!({"ready": 1, "side": SIDES[place]}))?;
            // The first round warms up caches.
            starts[place].extend(took.into_iter().filter(|_| round > 0));
        }
    }
    clients.end()?;
    let names = [
        "1+1: jupyter_kernel_client over the Jupyter door",
        "1+1: the same over Jupyter Kernel Gateway",
        "1+1: jupyter_client, a kernel of this machine, ipc",
    ];
    names.into_iter().zip(found).for_each(|(name, found)| figures.add(name, MS, found));
    figures.compare("door : jupyter_client with a kernel of its own", names[0], names[2], Some(1.2));
    figures.compare("door : Jupyter Kernel Gateway", names[0], names[1], Some(0.2));
    let names = [
        "kernel from a pool: POST /api/kernels until kernel_info_reply",
        "kernel: the same at Jupyter Kernel Gateway",
        "kernel: jupyter_client, until its first answer",
    ];
    names.into_iter().zip(starts).for_each(|(name, found)| figures.add(name, MS, found));
    figures.bound("a kernel from a pool : 50 ms", names[0], 50.0);
    Ok(())
}
