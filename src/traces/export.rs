//! Sends spans to the collector, in batches and one after the other. What it says beside its status is not read: it may be anybody.

use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::trace::SpanData;
use prost::Message;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::LAST_SPANS;
use crate::metrics::Metrics;

/// Most spans of one request.
const BATCH: usize = 512;
/// Spans wait this long for others to go with.
const GATHER: Duration = Duration::from_secs(1);
/// The log tells of spans that were dropped so often at most.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// A client of the collector.
///
/// # Errors
/// What is wrong, without any value of a header.
pub(super) fn client(endpoint: &str, headers: &str, timeout: Duration) -> Result<reqwest::Client, String> {
    let mut all = read_headers(headers)?;
    all.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
    let builder = reqwest::Client::builder()
        .default_headers(all)
        .timeout(timeout)
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("cellblock/", env!("CARGO_PKG_VERSION")));
    let builder = if endpoint.starts_with("https://") {
        builder.https_only(true)
    } else {
        // There is no TLS on this way, so nothing is verified; without this line the client can't be built in a container that has no certificates of authorities.
        builder.tls_danger_accept_invalid_certs(true)
    };
    builder.build().map_err(|error| words("a client of the collector can't be made", &error))
}

fn read_headers(text: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let header = line.split_once(':').and_then(|(name, value)| {
            let name: HeaderName = name.trim().parse().ok()?;
            let mut value: HeaderValue = value.trim().parse().ok()?;
            value.set_sensitive(true);
            Some((name, value))
        });
        let (name, value) = header.ok_or_else(|| format!("line {} is not a header, \"Name: value\"", at + 1))?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// What sends spans.
pub(super) struct Exporter {
    client: reqwest::Client,
    url: String,
    resource: ResourceAttributesWithSchema,
    metrics: Metrics,
    /// How many were dropped when the log last told so, and when that was.
    told: (u64, Option<Instant>),
}

impl Exporter {
    pub(super) fn new(
        client: reqwest::Client,
        endpoint: &str,
        resource: ResourceAttributesWithSchema,
        metrics: Metrics,
    ) -> Self {
        let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
        Self { client, url, resource, metrics, told: (0, None) }
    }

    /// Sends what comes until nothing more does.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<SpanData>, closing: CancellationToken) {
        let mut spans = Vec::new();
        loop {
            let gathered = closing.run_until_cancelled(async {
                if queue.recv_many(&mut spans, BATCH).await == 0 {
                    return false;
                }
                let others = async {
                    while let room @ 1.. = BATCH - spans.len()
                        && queue.recv_many(&mut spans, room).await > 0
                    {}
                };
                // Either way there are some.
                let _ = timeout(GATHER, others).await;
                true
            });
            if gathered.await != Some(true) {
                break;
            }
            self.send(std::mem::take(&mut spans)).await;
        }
        queue.close();
        let last = async {
            while !spans.is_empty() || queue.recv_many(&mut spans, BATCH).await > 0 {
                self.send(std::mem::take(&mut spans)).await;
            }
        };
        // The process does not wait longer for them.
        let _ = timeout(LAST_SPANS, last).await;
    }

    async fn send(&mut self, spans: Vec<SpanData>) {
        let count = spans.len();
        let resource_spans = group_spans_by_resource_and_scope(spans, &self.resource);
        let body = ExportTraceServiceRequest { resource_spans }.encode_to_vec();
        let reason = match self.client.post(&self.url).body(body).send().await {
            Ok(answer) if answer.status().is_success() => "more came than were sent".to_owned(),
            Ok(answer) => {
                self.metrics.trace_spans_dropped(count);
                format!("the collector answered {}", answer.status())
            }
            Err(error) => {
                self.metrics.trace_spans_dropped(count);
                let late = "the collector did not answer in time";
                words(if error.is_timeout() { late } else { "the collector can't be reached" }, &error)
            }
        };
        self.tell(&reason);
    }

    fn tell(&mut self, reason: &str) {
        let (total, (told, at)) = (self.metrics.dropped_trace_spans(), self.told);
        if total > told && at.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
            tracing::warn!(dropped = total - told, reason, "spans of traces were dropped");
            self.told = (total, Some(Instant::now()));
        }
    }
}

/// What went wrong, with what is behind it.
fn words(what: &str, error: &reqwest::Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(what.to_owned(), |words, cause| format!("{words}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_and_kept_out_of_what_is_printed() {
        let headers = read_headers("Authorization: Bearer s3cret\n\nx-tenant:a:b\n").unwrap();
        assert_eq!(headers["authorization"], "Bearer s3cret");
        assert_eq!(headers["x-tenant"], "a:b");
        assert!(!format!("{headers:?}").contains("s3cret"));
    }

    #[test]
    fn a_line_that_is_no_header_is_named_without_what_is_in_it() {
        for text in ["a: b\ns3cret", "a: b\nsp ace: s3cret", "a: b\nc: s3cret\u{7f}"] {
            assert_eq!(read_headers(text).unwrap_err(), "line 2 is not a header, \"Name: value\"");
        }
    }
}
