//! `GET /metrics`: what Prometheus scrapes, under vLLM's names where the thing is the same.
//!
//! What the engine counts is asked of it at each scrape; what passes through HTTP is counted
//! here. Labels are words of this program, never of a request.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use strand_engine::{FinishReason, Stats};

use super::asking::blocking;
use super::error::ApiError;
use super::lenient::Fields;
use super::state::App;

/// Counts what passes. Clones share the counts.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
    finished: Family<Finished, Counter>,
    cancelled: Counter,
    answers: Family<Answered, Counter>,
    unknown_fields: Counter,
    toggles: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Finished {
    finished_reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    route: String,
    status: u16,
}

impl Default for Metrics {
    fn default() -> Self {
        let short = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let (first_token, between_tokens) = (short(), short());
        let whole = Histogram::new(exponential_buckets(0.01, 2.0, 16));
        let (finished, answers) = (Family::default(), Family::default());
        let (cancelled, toggles) = (Counter::default(), Counter::default());
        let unknown_fields = Counter::default();
        let mut registry = Registry::default();
        let mut times = |name, help, histogram: &Histogram| {
            registry.register(name, help, histogram.clone());
        };
        times("vllm:time_to_first_token_seconds", "Time to the first token", &first_token);
        times("vllm:inter_token_latency_seconds", "Time between tokens", &between_tokens);
        times("vllm:e2e_request_latency_seconds", "Time to the last token", &whole);
        registry.register(
            "vllm:request_success",
            "Answers that ended by themselves",
            finished.clone(),
        );
        registry.register(
            "strand:request_cancelled",
            "Requests whose client left",
            cancelled.clone(),
        );
        registry.register("strand:http_answers", "Answers by route and status", answers.clone());
        registry.register("strand:toggles", "Chunks switched on or off", toggles.clone());
        registry.register(
            "strand:unknown_fields",
            "Fields of requests that nothing here knows",
            unknown_fields.clone(),
        );
        Self {
            registry: Arc::new(registry),
            first_token,
            between_tokens,
            whole,
            finished,
            cancelled,
            answers,
            unknown_fields,
            toggles,
        }
    }
}

impl Metrics {
    pub fn first_token(&self, time: Duration) {
        self.first_token.observe(time.as_secs_f64());
    }

    pub fn next_token(&self, time: Duration) {
        self.between_tokens.observe(time.as_secs_f64());
    }

    pub fn finished(&self, reason: FinishReason, time: Duration) {
        self.whole.observe(time.as_secs_f64());
        self.finished.get_or_create(&Finished { finished_reason: reason.as_str() }).inc();
    }

    pub fn cancelled(&self) {
        self.cancelled.inc();
    }

    /// `route` as the table has it.
    pub fn answered(&self, route: &str, status: u16) {
        let labels = Answered { route: route.to_owned(), status };
        self.answers.get_or_create(&labels).inc();
    }

    /// A request was read: what nobody took out of it is counted.
    pub fn was_read(&self, fields: &Fields) {
        self.unknown_fields.inc_by(fields.unknown() as u64);
    }

    /// Chunks of a context were switched on or off.
    pub fn toggled(&self, chunks: usize) {
        self.toggles.inc_by(chunks as u64);
    }

    fn to_text(&self, stats: Stats) -> Result<String, fmt::Error> {
        let mut engine = Registry::default();
        engine.register_collector(Box::new(EngineStats(stats)));
        let (mut text, mut http) = (String::new(), String::new());
        encode(&mut text, &engine)?;
        encode(&mut http, &self.registry)?;
        // both end the exposition, which has one end
        let end = "# EOF\n";
        Ok(text.strip_suffix(end).unwrap_or(&text).to_owned() + &http)
    }
}

/// What the engine counts, at one moment.
#[derive(Debug)]
struct EngineStats(Stats);

impl Collector for EngineStats {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let stats = &self.0;
        let used = stats.blocks - stats.blocks_free;
        let gauges = [
            ("vllm:num_requests_running", "Sequences that compute", stats.running as f64),
            ("vllm:num_requests_waiting", "Sequences that wait", stats.waiting as f64),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the pool in use, from 0 to 1",
                used as f64 / stats.blocks.max(1) as f64,
            ),
            ("strand:kv_blocks", "Blocks of the pool", stats.blocks as f64),
            ("strand:kv_blocks_free", "Blocks that nobody uses", stats.blocks_free as f64),
            ("strand:kv_device_bytes", "KV in the pool", stats.device_bytes as f64),
            ("strand:kv_host_bytes", "KV kept beside the pool", stats.host_bytes as f64),
            ("strand:kv_disk_bytes", "KV in files", stats.disk_bytes as f64),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counters = [
            ("vllm:prompt_tokens", "Tokens of prompts", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated", stats.generated_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked for", stats.prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens whose KV was there", stats.cached_tokens),
            ("vllm:num_preemptions", "Sequences that lost their blocks", stats.preemptions),
            ("strand:encoded_tokens", "Prompt tokens computed", stats.encoded_tokens),
            ("strand:reused_tokens_device", "Found in the pool", stats.reuse.device as u64),
            ("strand:reused_tokens_host", "Back from the host", stats.reuse.host as u64),
            ("strand:reused_tokens_disk", "Back from the disk", stats.reuse.disk as u64),
            ("strand:recomputed_tokens", "Computed again", stats.reuse.recomputed as u64),
            ("strand:evictions_device", "Blocks, the pool was full", stats.evicted_blocks),
            ("strand:evictions_host", "Segments, the host was full", stats.evicted_segments),
            ("strand:restores_host", "Segments back from the host", stats.restored.from_host),
            ("strand:restores_disk", "Segments back from the disk", stats.restored.from_disk),
            ("strand:requests", "Requests taken in", stats.requests),
            ("strand:steps", "Steps of the engine", stats.steps),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(
                name,
                help,
                None,
                counter.metric_type(),
            )?)?;
        }
        let (name, help) = ("vllm:request_queue_time_seconds", "Time before the first step");
        let times = stats.queue_times;
        let end = |(bound, count): (Option<f64>, u64)| (bound.unwrap_or(f64::INFINITY), count);
        let buckets: Vec<(f64, u64)> = times.buckets().map(end).collect();
        let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        encoder.encode_histogram::<NoLabelSet>(times.seconds, times.count(), &buckets, None)
    }
}

pub async fn scrape(State(app): State<App>) -> Result<Response, ApiError> {
    let stats = blocking(&app, |server| Ok(server.engine.stats()?)).await?;
    let text = app.metrics.to_text(stats).map_err(|error| {
        tracing::error!(%error, "the metrics can't be written");
        ApiError::internal()
    })?;
    let media = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, media)], text).into_response())
}

#[cfg(test)]
mod tests {
    use strand_engine::QueueTimes;

    use super::*;

    #[test]
    fn one_exposition_holds_what_engine_and_http_count() {
        let metrics = Metrics::default();
        metrics.answered("/health", 200);
        metrics.finished(FinishReason::Stop, Duration::from_secs(1));
        let mut queue_times = QueueTimes::default();
        queue_times.observe(Duration::from_millis(3));
        let stats =
            Stats { running: 3, blocks: 4, blocks_free: 1, queue_times, ..Stats::default() };
        let text = metrics.to_text(stats).expect("it can be written");
        for line in [
            "vllm:num_requests_running 3.0",
            "vllm:kv_cache_usage_perc 0.75",
            "vllm:request_queue_time_seconds_bucket{le=\"0.002\"} 0",
            "vllm:request_queue_time_seconds_bucket{le=\"0.004\"} 1",
            "vllm:request_queue_time_seconds_bucket{le=\"+Inf\"} 1",
            "vllm:request_queue_time_seconds_count 1",
            "vllm:request_success_total{finished_reason=\"stop\"} 1",
            "strand:http_answers_total{route=\"/health\",status=\"200\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
        assert_eq!(text.matches("# EOF").count(), 1);
        assert!(text.ends_with("# EOF\n"));
    }
}
