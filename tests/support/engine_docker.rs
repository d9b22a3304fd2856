//! The local Docker engine for tests: an instance of its own for each, and nothing of it left afterwards.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::container::LogOutput;
use bollard::exec::{CreateExecOptions, StartExecResults};
use bollard::models::{ContainerConfig, ContainerCreateBody, HostConfig, Mount, MountType};
use bollard::query_parameters::{
    CommitContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    KillContainerOptionsBuilder, ListContainersOptionsBuilder, ListVolumesOptionsBuilder, PushImageOptionsBuilder,
    RemoveContainerOptionsBuilder, RemoveImageOptionsBuilder, RemoveVolumeOptionsBuilder,
    UploadToContainerOptionsBuilder,
};
use cellblock::engine::docker::{DockerEngine, DockerSettings, GuestFile};
use cellblock::engine::{CellName, Engine, Pull};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};

/// What cells of tests are made from.
pub const IMAGE: &str = "cellblock/python:latest";

/// An engine under an instance's name of its own, ready for cells.
pub struct Bench {
    /// The engine.
    pub engine: DockerEngine,
    /// The instance.
    pub instance: String,
    /// The settings that the engine was made from.
    pub settings: DockerSettings,
    /// The id of [`IMAGE`].
    pub image: String,
    /// Docker without anything between.
    pub docker: Docker,
}

/// Runs a test on an engine whose cells run these files, removes what it left, and fails if that was anything but volumes.
pub async fn on_docker<T, F>(guest_files: Vec<GuestFile>, test: T)
where
    T: FnOnce(std::sync::Arc<Bench>) -> F,
    F: Future<Output = ()>,
{
    let bench = std::sync::Arc::new(Bench::new(guest_files).await);
    let outcome = AssertUnwindSafe(test(bench.clone())).catch_unwind().await;
    let left = sweep(&bench.docker, &bench.instance).await;
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    assert!(left.is_empty(), "the test left containers: {left:?}");
}

impl Bench {
    async fn new(guest_files: Vec<GuestFile>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let instance = format!("t{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let settings = DockerSettings { guest_files, ..DockerSettings::new(&instance) };
        let engine = DockerEngine::connect(settings.clone()).await.expect("a Docker engine on this machine");
        let image = engine.resolve_image(IMAGE, Pull::Never).await.unwrap_or_else(|e| panic!("{e}; run `make images`"));
        engine.prepare(&image.id).await.expect("an engine that can confine cells");
        let docker = Docker::connect_with_socket_defaults().expect("a Docker engine on this machine");
        Self { engine, instance, settings, image: image.id, docker }
    }

    /// Ends a cell's first process behind the engine's back.
    pub fn killer(&self) -> impl Fn(CellName) -> BoxFuture<'static, ()> + Sync + use<> {
        let docker = self.docker.clone();
        move |name| {
            let docker = docker.clone();
            async move {
                let options = KillContainerOptionsBuilder::default().signal("SIGKILL").build();
                docker.kill_container(name.as_str(), Some(options)).await.expect("a kill");
            }
            .boxed()
        }
    }
}

/// An image like [`IMAGE`] that says something else of itself; returns its id. Remove it with [`forget`].
pub async fn commit(bench: &Bench, config: ContainerConfig) -> String {
    let name = format!("cellblock-{}-commit", bench.instance);
    let body = ContainerCreateBody {
        image: Some(bench.image.clone()),
        // Ours, so that it is swept away; the image must not have it.
        cmd: Some(vec!["true".to_owned()]),
        ..ContainerCreateBody::default()
    };
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    bench.docker.create_container(Some(options), body).await.expect("a container");
    let options = CommitContainerOptionsBuilder::default().container(&name).build();
    let image = bench.docker.commit_container(options, config).await.expect("an image").id;
    remove(bench, &name).await;
    image
}

/// Makes an image of one small file, pushes it as `name:1`, and forgets it here.
pub async fn push_tiny_image(bench: &Bench, name: &str, user: &str, password: &str) {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(2);
    header.set_mode(0o444);
    archive.append_data(&mut header, "file", b"x\n".as_slice()).expect("an archive");
    let archive = bollard::body_full(archive.into_inner().expect("an archive").into());
    let options = CreateImageOptionsBuilder::default().from_src("-").repo(name).tag("1").build();
    let import = bench.docker.create_image(Some(options), Some(archive), None);
    import.for_each(|step| async move { drop(step.expect("an import")) }).await;

    let credentials = DockerCredentials {
        username: Some(user.to_owned()),
        password: Some(password.to_owned()),
        ..DockerCredentials::default()
    };
    // The library's encoding of these credentials is not the engine's; the engine under test corrects that, and here we must.
    let docker = bench.docker.clone().with_request_modifier(|mut request| {
        if let Some(value) = request.headers_mut().get_mut("x-registry-auth") {
            *value = value.to_str().expect("base 64").replace('+', "-").replace('/', "_").parse().expect("base 64");
        }
        request
    });
    let options = PushImageOptionsBuilder::default().tag("1").build();
    let push = docker.push_image(name, Some(options), Some(credentials));
    push.for_each(|step| async move { drop(step.expect("a push")) }).await;
    forget(bench, &format!("{name}:1")).await;
}

/// Writes a file into the guest's volume, as somebody with access to the engine could.
pub async fn put_into_volume(bench: &Bench, name: &str, file: &str, bytes: &[u8]) {
    let mount = Mount {
        typ: Some(MountType::VOLUME),
        source: Some(bench.engine.guest_volume().to_owned()),
        target: Some("/mnt".to_owned()),
        ..Mount::default()
    };
    let body = ContainerCreateBody {
        image: Some(bench.image.clone()),
        host_config: Some(HostConfig { mounts: Some(vec![mount]), ..HostConfig::default() }),
        ..ContainerCreateBody::default()
    };
    let options = CreateContainerOptionsBuilder::default().name(name).build();
    bench.docker.create_container(Some(options), body).await.expect("a container");
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o555);
    archive.append_data(&mut header, file, bytes).expect("an archive");
    let archive = bollard::body_full(archive.into_inner().expect("an archive").into());
    let options = UploadToContainerOptionsBuilder::default().path("/mnt").build();
    bench.docker.upload_to_container(name, Some(options), archive).await.expect("an upload");
    remove(bench, name).await;
}

/// Removes an image that a test made.
pub async fn forget(bench: &Bench, image: &str) {
    let options = RemoveImageOptionsBuilder::default().force(true).build();
    bench.docker.remove_image(image, Some(options), None).await.expect("a removal");
}

/// Removes a container.
pub async fn remove(bench: &Bench, name: &str) {
    let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    bench.docker.remove_container(name, Some(options)).await.expect("a removal");
}

/// Runs a program in a container, as its user, and returns what it printed. The control plane itself never does this.
pub async fn execute(bench: &Bench, name: &str, program: &[&str]) -> String {
    let options = CreateExecOptions {
        cmd: Some(program.to_vec()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        ..CreateExecOptions::default()
    };
    let id = bench.docker.create_exec(name, options).await.expect("an execution").id;
    let StartExecResults::Attached { mut output, .. } = bench.docker.start_exec(&id, None).await.expect("an execution")
    else {
        panic!("not attached");
    };
    let mut text = String::new();
    while let Some(Ok(LogOutput::StdOut { message } | LogOutput::StdErr { message })) = output.next().await {
        text.push_str(&String::from_utf8_lossy(&message));
    }
    text
}

/// Removes containers and volumes of an instance; returns the containers' names.
async fn sweep(docker: &Docker, instance: &str) -> Vec<String> {
    let filters = HashMap::from([("label", vec![format!("io.cellblock.instance={instance}")])]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    let containers = docker.list_containers(Some(options)).await.expect("a list");
    let mut left = Vec::new();
    for container in containers {
        let id = container.id.expect("an id");
        // It may be going already.
        while docker.inspect_container(&id, None).await.is_ok() {
            let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            let _ = docker.remove_container(&id, Some(options)).await;
        }
        left.extend(container.names.into_iter().flatten());
    }
    let options = ListVolumesOptionsBuilder::default().filters(&filters).build();
    for volume in docker.list_volumes(Some(options)).await.expect("a list").volumes.into_iter().flatten() {
        let options = RemoveVolumeOptionsBuilder::default().build();
        docker.remove_volume(&volume.name, Some(options)).await.expect("a removal");
    }
    left
}

/// The guest of this repository, built for containers.
pub fn real_guest() -> Vec<GuestFile> {
    let program = Path::new(env!("CARGO_BIN_EXE_cellblock")).with_file_name("cellblock-guest");
    let bytes = std::fs::read(&program).unwrap_or_else(|e| panic!("{}: {e}; run `make guest`", program.display()));
    vec![GuestFile { name: "guest".to_owned(), mode: 0o555, bytes }]
}

/// A guest that is a script: it answers markers, and does what lines between them say. For what the real one never does.
pub fn scripted_guest() -> Vec<GuestFile> {
    let bytes = include_bytes!("engine_guest.py").to_vec();
    vec![GuestFile { name: "guest".to_owned(), mode: 0o555, bytes }]
}
