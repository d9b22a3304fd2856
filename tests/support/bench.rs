//! A control plane in this process on the fake engine, without a front door. Nothing here knows what is tested.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cellblock::domain::egress::NetworkOffer;
use cellblock::domain::ids::InstallationId;
use cellblock::domain::spec::{
    MIB, OnGuestLost, OnIdle, OnKernelDeath, OutputLimits, Resources, SessionRequest, Template, Timeouts,
};
use cellblock::engine::{CellName, Engine, Pull};
use cellblock::http::door::{Door, Tries};
use cellblock::http::listen::Connections;
use cellblock::http::origins::Origins;
use cellblock::http::remote::Proxies;
use cellblock::http::{self, App, Bounds, Ports};
use cellblock::service::keys::{KeyRing, Principal, Scope};
use cellblock::service::offer::{Choice, Offer};
use cellblock::service::{Error, ExecuteRequest, Service};
use cellblock::session::capacity::Ceilings;
use cellblock::session::execution::Execution;
use cellblock::session::pool::Pool;
use cellblock::session::reconcile::Reconciler;
use cellblock::session::registry::{Created, Limits, Registry};
use cellblock::session::tap::TapBounds;
use cellblock::session::{Session, Settings};
use cellblock::store::Archive;
use cellblock::store::state::State;

use crate::engine_fake::{FakeEngine, IMAGE};

/// The name of the control plane on its engine.
pub const INSTANCE: &str = "fake";
/// How long anything here may take before it counts as never.
pub const NEVER: Duration = Duration::from_secs(40);

/// A control plane in this process on an engine that can be told to fail.
pub struct Bench {
    pub engine: Arc<FakeEngine>,
    pub registry: Arc<Registry>,
    pub service: Arc<Service>,
    pub keys: Arc<KeyRing>,
    pub who: Principal,
    /// The same for every control plane of one data folder.
    pub installation: InstallationId,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(|_, _| {})
    }

    pub fn with(change: impl FnOnce(&mut Settings, &mut Template)) -> Self {
        Self::on(Arc::new(FakeEngine::new(INSTANCE)), None, change)
    }

    /// Another control plane on an engine.
    pub fn beside(engine: Arc<FakeEngine>) -> Self {
        let installation = InstallationId::from_uuid(uuid::Uuid::new_v4());
        Self { installation, ..Self::on(engine, None, |_, _| {}) }
    }

    pub fn on(
        engine: Arc<FakeEngine>,
        state: Option<State>,
        change: impl FnOnce(&mut Settings, &mut Template),
    ) -> Self {
        Self::keeping(engine, None, state, change)
    }

    pub fn keeping(
        engine: Arc<FakeEngine>,
        archive: Option<Archive>,
        state: Option<State>,
        change: impl FnOnce(&mut Settings, &mut Template),
    ) -> Self {
        let mut settings = Settings {
            start_timeout: Duration::from_secs(5),
            interrupt_grace: Duration::from_millis(200),
            orphan_timeout: Duration::from_secs(60),
            queued_executions: 3,
            queue_timeout: Duration::from_secs(60),
            contexts: 2,
            inline: usize::MAX,
            package_bytes: 1,
            package_timeout: Duration::from_secs(1),
            tap: TapBounds { bytes: 0, time: Duration::ZERO },
        };
        let mut template = template();
        change(&mut settings, &mut template);
        let limits = Limits {
            ceilings: Ceilings {
                sessions: 5,
                cpu_millis: None,
                memory_bytes: None,
                starts: 4,
                waiting: 2,
                patience: Duration::from_millis(300),
            },
            session_retention: NEVER,
            execution_retention: NEVER,
            executions: 100,
            execution_bytes: MIB,
            workspaces: 10,
        };
        let shared: Arc<dyn Engine> = engine.clone();
        let (instance, pool) = (INSTANCE.to_owned(), Pool::new(Vec::new()));
        let registry =
            Arc::new(Registry::new(Arc::clone(&shared), archive.clone(), state, instance, settings, limits, pool));
        let keys = Arc::<KeyRing>::default();
        let other = Template { name: "u".to_owned(), ..template.clone() };
        let templates = BTreeMap::from([("t".to_owned(), template), ("u".to_owned(), other)]);
        let offer = Offer::new(Choice { templates, default: "t".to_owned() });
        let service = Service::new(Arc::clone(&registry), shared, offer, Pull::Never, archive);
        let service = Arc::new(service.with_keys(Arc::clone(&keys)));
        let who = Principal::new("one", [Scope::Sessions]);
        let installation = InstallationId::from_uuid(uuid::Uuid::from_u128(1));
        Self { engine, registry, service, keys, who, installation }
    }

    /// A front door before it, every door of which is closed that can be.
    pub fn app(&self) -> App {
        App {
            service: Arc::clone(&self.service),
            door: Arc::new(Door::new(Arc::clone(&self.keys), Tries { most: 100, within: NEVER })),
            instance: Arc::from(INSTANCE),
            bounds: Bounds { body: usize::try_from(MIB).expect("it fits"), body_time: NEVER },
            proxies: Proxies::new(Vec::new(), "x-forwarded-for"),
            origins: Origins::new(&[""; 0]),
            ports: Ports { within: NEVER, is_tls: false },
            jupyter: None,
            mcp: None,
            e2b: None,
            classic: None,
            connect: false,
            sockets: http::jupyter::Sockets::default(),
            started: jiff::Timestamp::now(),
        }
    }

    /// What connections to it may take, over plain HTTP, when nothing of an answer is taken for so long.
    pub fn connections(&self, patience: Duration) -> Connections {
        Connections {
            most: 100,
            most_of_one: 100,
            head_time: NEVER,
            head_bytes: 16 * 1024,
            write_time: patience,
            ports_domain: None,
            e2b: None,
            plain_from_proxies_only: false,
            tls: None,
        }
    }

    pub async fn create(&self) -> Result<Session, Error> {
        let request = SessionRequest::default();
        match bounded(self.service.create_session(&self.who, &request, true, None)).await? {
            Created::New(session) | Created::Reused(session) => Ok(session),
        }
    }

    pub async fn start(&self, session: &Session, code: &str, timeout_seconds: f64) -> Result<Arc<Execution>, Error> {
        let request = ExecuteRequest {
            code: code.to_owned(),
            timeout_seconds: Some(timeout_seconds),
            ..ExecuteRequest::default()
        };
        self.service.execute(&self.who, session.id, request, None).await
    }

    pub async fn run(&self, session: &Session, code: &str, timeout_seconds: f64) -> Arc<Execution> {
        let execution = self.start(session, code, timeout_seconds).await.expect("accepted");
        bounded(execution.ended()).await;
        execution
    }

    /// Of an installation of its own.
    pub fn reconciler(&self) -> Reconciler {
        Reconciler::new(self.engine.clone(), Arc::clone(&self.registry), self.installation)
    }

    pub async fn cells(&self) -> usize {
        self.engine.list().await.map_or(0, |cells| cells.len())
    }
}

/// What sessions are made from.
pub fn template() -> Template {
    let resources = Resources {
        cpu_millis: 1000,
        memory_bytes: 512 * MIB,
        disk_bytes: 64 * MIB,
        tmp_bytes: 64 * MIB,
        pids: 64,
        open_files: 1024,
    };
    let timeouts = Timeouts { idle: NEVER, lifetime: NEVER, execution: NEVER, paused: NEVER };
    Template {
        name: "t".to_owned(),
        description: String::new(),
        image: IMAGE.to_owned(),
        runtime: String::new(),
        accept_unenforced: std::collections::BTreeSet::new(),
        kernelspec: String::new(),
        transport: cellblock::domain::spec::KernelTransport::Ipc,
        env: BTreeMap::new(),
        default_resources: resources,
        max_resources: resources,
        default_timeouts: timeouts,
        max_timeouts: timeouts,
        output: OutputLimits {
            text_bytes: 1000,
            result_bytes: 1000,
            total_bytes: 3000,
            messages: 100,
            messages_per_second: 100,
        },
        network: NetworkOffer::default(),
        ports: cellblock::domain::ports::Ports::default(),
        data: Vec::new(),
        workspace: None,
        accept_unlimited_workspace: false,
        setup: String::new(),
        on_kernel_death: OnKernelDeath::Restart,
        on_guest_lost: OnGuestLost::End,
        pools: Vec::new(),
        on_idle: OnIdle::Delete,
        workdir: cellblock::domain::spec::WORKDIR.to_owned(),
    }
}

/// Waits, but not for ever.
pub async fn bounded<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(NEVER, future).await.expect("this never ends")
}

/// The name of a session's cell.
pub fn cell_of(session: &Session) -> CellName {
    CellName::new(INSTANCE, session.id, 1)
}
