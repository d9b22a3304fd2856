//! What the conformance suite of the Model Context Protocol asks of a server beyond the protocol itself: tools, resources and prompts of certain names that answer
//! in certain ways. A handler of messages behind [`Mcp`](cellblock::http::mcp::Mcp); how they travel is no affair of it.

use std::time::Duration;

use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, ClientCapabilities, CompleteRequestParams, CompleteResult,
    ErrorData, GetPromptRequestParams, GetPromptResponse, GetPromptResult, Implementation, InputRequiredResult,
    InputResponses, ListPromptsResult, ListResourceTemplatesResult, ListResourcesResult, ListToolsResult,
    PaginatedRequestParams, ProgressNotificationParam, ReadResourceRequestParams, ReadResourceResponse,
    ReadResourceResult, ServerCapabilities, ServerConfig, ServerRequest,
};
use rmcp::service::{RequestContext, RoleServer};
use rmcp::{RoleServer as Server, ServerHandler};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A picture of one point.
const PICTURE: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
/// A sound without a sample.
const SOUND: &str = "UklGRiQAAABXQVZFZm10IBAAAAABAAEARKwAAIhYAQACABAAZGF0YQAAAAA=";
/// Between two signs of life of a tool.
const STEP: Duration = Duration::from_millis(50);
/// The tools: they take nothing.
const TOOLS: [&str; 23] = [
    "test_simple_text",
    "test_image_content",
    "test_audio_content",
    "test_embedded_resource",
    "test_multiple_content_types",
    "test_tool_with_logging",
    "test_logging_tool",
    "test_error_handling",
    "test_tool_with_progress",
    "test_missing_capability",
    "test_streaming_elicitation",
    "test_input_required_result_elicitation",
    "test_input_required_result_sampling",
    "test_input_required_result_list_roots",
    "test_input_required_result_request_state",
    "test_input_required_result_multiple_inputs",
    "test_input_required_result_multi_round",
    "test_input_required_result_tampered_state",
    "test_input_required_result_capabilities",
    "test_sampling",
    "test_elicitation",
    "test_elicitation_sep1034_defaults",
    "test_elicitation_sep1330_enums",
];

/// The fixture.
#[derive(Debug, Clone)]
pub struct Fixture;

type Context = RequestContext<RoleServer>;

/// Reads what is written here as JSON.
fn written<T: DeserializeOwned>(value: Value) -> Result<T, ErrorData> {
    serde_json::from_value(value).map_err(|error| ErrorData::internal_error(format!("the fixture: {error}"), None))
}

/// Reads a result: one that is whole, as the newer revision has to be told.
fn whole<T: DeserializeOwned>(mut value: Value) -> Result<T, ErrorData> {
    value["resultType"] = json!("complete");
    written(value)
}

fn content(blocks: Value) -> Result<CallToolResponse, ErrorData> {
    Ok(whole::<CallToolResult>(json!({ "content": blocks }))?.into())
}

fn text(text: &str) -> Result<CallToolResponse, ErrorData> {
    content(json!([{"type": "text", "text": text}]))
}

fn picture() -> Value {
    json!({"type": "image", "data": PICTURE, "mimeType": "image/png"})
}

fn resource(uri: &str, mime: &str, text: &str) -> Value {
    json!({"type": "resource", "resource": {"uri": uri, "mimeType": mime, "text": text}})
}

/// A question to the user, for one value.
fn question(message: &str, field: &str, kind: &str) -> Value {
    let schema = json!({"type": "object", "properties": {field: {"type": kind}}, "required": [field]});
    json!({"method": "elicitation/create", "params": {"mode": "form", "message": message, "requestedSchema": schema}})
}

/// A question to the client's model.
fn prompt(text: &str, most: u32) -> Value {
    let message = json!({"role": "user", "content": {"type": "text", "text": text}});
    json!({"method": "sampling/createMessage", "params": {"messages": [message], "maxTokens": most}})
}

fn roots() -> Value {
    json!({"method": "roots/list", "params": {}})
}

fn required(requests: Value, state: Option<&str>) -> Result<InputRequiredResult, ErrorData> {
    let mut result = json!({"resultType": "input_required", "inputRequests": requests});
    if let Some(state) = state {
        result["requestState"] = json!(state);
    }
    written(result)
}

/// A state that nobody else can make.
fn sealed(name: &str) -> String {
    let digest = Sha256::digest(format!("a fixture's secret {name}"));
    digest.iter().fold(format!("{name}."), |state, byte| format!("{state}{byte:02x}"))
}

/// Holds a state to what it was.
fn check(state: Option<&str>, name: &str) -> Result<(), ErrorData> {
    match state {
        Some(state) if state == sealed(name) => Ok(()),
        _ => Err(ErrorData::invalid_params("the state is not one of this server's", None)),
    }
}

fn declared(context: &Context) -> Value {
    serde_json::to_value(context.client_capabilities()).unwrap_or_default()
}

/// The value that a user has given, if there is one.
fn given<'a>(responses: &'a InputResponses, key: &str, field: &str) -> Option<&'a Value> {
    responses.get(key)?.get("content")?.get(field)
}

/// A choice among words that have titles.
fn titled(words: [&str; 2]) -> Value {
    json!(words.map(|word| json!({"const": word, "title": word.to_uppercase()})))
}

/// What a client of the older revision is asked by the tool of this name, while the tool runs.
fn asked_by(tool: &str, arguments: &Value) -> Value {
    let form = |properties: Value| json!({"type": "object", "properties": properties});
    let (message, schema) = match tool {
        "test_sampling" => return prompt(arguments["prompt"].as_str().unwrap_or_default(), 100),
        "test_elicitation" => {
            let schema = form(json!({"username": {"type": "string"}, "email": {"type": "string"}}));
            (arguments["message"].as_str().unwrap_or_default(), schema)
        }
        "test_elicitation_sep1034_defaults" => (
            "Defaults",
            form(json!({
                "name": {"type": "string", "default": "John Doe"},
                "age": {"type": "integer", "default": 30},
                "score": {"type": "number", "default": 95.5},
                "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
                "verified": {"type": "boolean", "default": true},
            })),
        ),
        _ => (
            "Choices",
            form(json!({
                "untitledSingle": {"type": "string", "enum": ["option1", "option2", "option3"]},
                "titledSingle": {"type": "string", "oneOf": titled(["value1", "value2"])},
                "legacyEnum": {"type": "string", "enum": ["opt1", "opt2"], "enumNames": ["Option One", "Option Two"]},
                "untitledMulti": {"type": "array", "items": {"type": "string", "enum": ["option1", "option2", "option3"]}},
                "titledMulti": {"type": "array", "items": {"anyOf": titled(["value1", "value2"])}},
            })),
        ),
    };
    json!({"method": "elicitation/create", "params": {"mode": "form", "message": message, "requestedSchema": schema}})
}

impl Fixture {
    /// Asks its client within the session, and waits.
    async fn asking_at_once(
        &self,
        params: &CallToolRequestParams,
        context: &Context,
    ) -> Result<CallToolResponse, ErrorData> {
        let arguments = Value::Object(params.arguments.clone().unwrap_or_default());
        let asked = written::<ServerRequest>(asked_by(&params.name, &arguments))?;
        let answer = context.peer.send_request(asked).await;
        let answer = answer.map_err(|error| ErrorData::internal_error(error.to_string(), None))?;
        text(&format!("The client has answered: {}", serde_json::to_string(&answer).unwrap_or_default()))
    }

    async fn logged(&self, context: &Context) -> Result<CallToolResponse, ErrorData> {
        for message in ["Tool execution started", "Tool processing data", "Tool execution completed"] {
            let told = written(json!({"level": "info", "logger": "fixture", "data": message}))?;
            #[allow(deprecated, reason = "clients of the older revision still ask for it")]
            let _ = context.peer.notify_logging_message(told).await;
            tokio::time::sleep(STEP).await;
        }
        text("Logging test completed")
    }

    async fn progressing(&self, context: &Context) -> Result<CallToolResponse, ErrorData> {
        for progress in [0.0, 50.0, 100.0] {
            if let Some(token) = context.meta.get_progress_token() {
                let told = ProgressNotificationParam::new(token, progress).with_total(100.0);
                let _ = context.peer.notify_progress(told).await;
            }
            tokio::time::sleep(STEP).await;
        }
        text("Progress test completed")
    }

    /// Tools that need something of their client first.
    fn asking(&self, params: CallToolRequestParams, context: &Context) -> Result<CallToolResponse, ErrorData> {
        let (given_all, state) = (params.input_responses.unwrap_or_default(), params.request_state.as_deref());
        let is_first = given_all.is_empty();
        match params.name.strip_prefix("test_input_required_result_").unwrap_or_default() {
            "elicitation" => match given(&given_all, "user_name", "name").and_then(Value::as_str) {
                Some(name) => text(&format!("Hello, {name}!")),
                None => {
                    Ok(required(json!({"user_name": question("What is your name?", "name", "string")}), None)?.into())
                }
            },
            "sampling" => match given_all.get("capital_question") {
                Some(answer) => text(&answer["content"].to_string()),
                None => {
                    let asked = json!({"capital_question": prompt("What is the capital of France?", 100)});
                    Ok(required(asked, None)?.into())
                }
            },
            "list_roots" => match given_all.get("client_roots") {
                Some(answer) => text(&answer["roots"].to_string()),
                None => Ok(required(json!({"client_roots": roots()}), None)?.into()),
            },
            name @ ("request_state" | "tampered_state") if is_first => {
                let asked = json!({"confirm": question("Please confirm", "ok", "boolean")});
                Ok(required(asked, Some(&sealed(name)))?.into())
            }
            name @ ("request_state" | "tampered_state") => {
                check(state, name)?;
                text("state-ok")
            }
            name @ "multiple_inputs" if is_first => {
                let asked = json!({
                    "user_name": question("What is your name?", "name", "string"),
                    "greeting": prompt("Generate a greeting", 50),
                    "client_roots": roots(),
                });
                Ok(required(asked, Some(&sealed(name)))?.into())
            }
            name @ "multiple_inputs" => {
                check(state, name)?;
                text("All inputs are here")
            }
            "multi_round" if is_first => {
                let asked = json!({"step1": question("Step 1: What is your name?", "name", "string")});
                Ok(required(asked, Some(&sealed("round 1")))?.into())
            }
            "multi_round" if given_all.contains_key("step1") => {
                check(state, "round 1")?;
                let asked = json!({"step2": question("Step 2: What is your favorite color?", "color", "string")});
                Ok(required(asked, Some(&sealed("round 2")))?.into())
            }
            "multi_round" => {
                check(state, "round 2")?;
                text("All rounds are done")
            }
            "capabilities" => {
                let (can, mut asked) = (declared(context), json!({}));
                for (capability, key, request) in [
                    ("sampling", "greeting", prompt("Generate a greeting", 50)),
                    ("elicitation", "user_name", question("What is your name?", "name", "string")),
                    ("roots", "client_roots", roots()),
                ] {
                    if can[capability].is_object() {
                        asked[key] = request;
                    }
                }
                if given_all.is_empty() { Ok(required(asked, None)?.into()) } else { text("done") }
            }
            _ => Err(ErrorData::invalid_params(format!("there is no tool \"{}\"", params.name), None)),
        }
    }
}

impl ServerHandler for Fixture {
    fn get_info(&self) -> ServerConfig {
        let capabilities = ServerCapabilities::builder().enable_tools().enable_resources().enable_prompts();
        #[allow(deprecated, reason = "clients of the older revision still ask for it")]
        let capabilities = capabilities.enable_completions().enable_logging().build();
        ServerConfig::new(capabilities).with_server_info(Implementation::new("fixture", "1"))
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<Server>,
    ) -> Result<ListToolsResult, ErrorData> {
        let tool = |name: &&str| json!({"name": name, "description": name, "inputSchema": {"type": "object", "properties": {}}});
        whole(json!({"tools": TOOLS.iter().map(tool).collect::<Vec<_>>()}))
    }

    async fn call_tool(&self, params: CallToolRequestParams, context: Context) -> Result<CallToolResponse, ErrorData> {
        match params.name.as_ref() {
            "test_simple_text" => text("This is a simple text response for testing."),
            "test_image_content" => content(json!([picture()])),
            "test_audio_content" => content(json!([{"type": "audio", "data": SOUND, "mimeType": "audio/wav"}])),
            "test_embedded_resource" => {
                let embedded =
                    resource("test://embedded-resource", "text/plain", "This is an embedded resource content.");
                content(json!([embedded]))
            }
            "test_multiple_content_types" => {
                let mixed =
                    resource("test://mixed-content-resource", "application/json", "{\"test\":\"data\",\"value\":123}");
                content(json!([{"type": "text", "text": "Multiple content types test:"}, picture(), mixed]))
            }
            "test_tool_with_logging" => self.logged(&context).await,
            // Nobody has asked for its log.
            "test_logging_tool" => text("Nothing was logged"),
            "test_error_handling" => {
                let told = "This tool intentionally returns an error for testing";
                Ok(whole::<CallToolResult>(json!({"content": [{"type": "text", "text": told}], "isError": true}))?
                    .into())
            }
            "test_tool_with_progress" => self.progressing(&context).await,
            "test_missing_capability" if !declared(&context)["sampling"].is_object() => {
                let needed = written::<ClientCapabilities>(json!({"sampling": {}}))?;
                Err(ErrorData::missing_required_client_capability(needed))
            }
            "test_missing_capability" => text("The client has it"),
            "test_streaming_elicitation" => {
                Ok(required(json!({"user_name": question("What is your name?", "name", "string")}), None)?.into())
            }
            "test_sampling"
            | "test_elicitation"
            | "test_elicitation_sep1034_defaults"
            | "test_elicitation_sep1330_enums" => self.asking_at_once(&params, &context).await,
            _ => self.asking(params, &context),
        }
    }

    async fn list_resources(
        &self,
        _: Option<PaginatedRequestParams>,
        _: Context,
    ) -> Result<ListResourcesResult, ErrorData> {
        whole(json!({"resources": [
            {"uri": "test://static-text", "name": "text", "description": "A text", "mimeType": "text/plain"},
            {"uri": "test://static-binary", "name": "picture", "description": "A picture", "mimeType": "image/png"},
        ]}))
    }

    async fn list_resource_templates(
        &self,
        _: Option<PaginatedRequestParams>,
        _: Context,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        let template =
            json!({"uriTemplate": "test://template/{id}/data", "name": "data", "mimeType": "application/json"});
        whole(json!({"resourceTemplates": [template]}))
    }

    async fn read_resource(
        &self,
        params: ReadResourceRequestParams,
        _: Context,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let uri = params.uri.as_str();
        let id = uri.strip_prefix("test://template/").and_then(|rest| rest.strip_suffix("/data"));
        let contents = match (uri, id) {
            ("test://static-text", _) => {
                json!({"uri": uri, "mimeType": "text/plain", "text": "This is the content of the static text resource."})
            }
            ("test://static-binary", _) => json!({"uri": uri, "mimeType": "image/png", "blob": PICTURE}),
            (_, Some(id)) => {
                let text = json!({"id": id, "templateTest": true, "data": format!("Data for ID: {id}")}).to_string();
                json!({"uri": uri, "mimeType": "application/json", "text": text})
            }
            _ => return Err(ErrorData::resource_not_found("there is nothing there", Some(json!({ "uri": uri })))),
        };
        Ok(whole::<ReadResourceResult>(json!({"contents": [contents]}))?.into())
    }

    #[allow(deprecated, reason = "clients of the older revision still ask for it")]
    async fn subscribe(&self, _: rmcp::model::SubscribeRequestParams, _: Context) -> Result<(), ErrorData> {
        Ok(())
    }

    #[allow(deprecated, reason = "clients of the older revision still ask for it")]
    async fn unsubscribe(&self, _: rmcp::model::UnsubscribeRequestParams, _: Context) -> Result<(), ErrorData> {
        Ok(())
    }

    #[allow(deprecated, reason = "clients of the older revision still ask for it")]
    async fn set_level(&self, _: rmcp::model::SetLevelRequestParams, _: Context) -> Result<(), ErrorData> {
        Ok(())
    }

    async fn complete(&self, _: CompleteRequestParams, _: Context) -> Result<CompleteResult, ErrorData> {
        whole(json!({"completion": {"values": ["paris", "park"], "total": 2, "hasMore": false}}))
    }

    async fn list_prompts(
        &self,
        _: Option<PaginatedRequestParams>,
        _: Context,
    ) -> Result<ListPromptsResult, ErrorData> {
        let argument = |name: &str| json!({"name": name, "description": name, "required": true});
        let prompt =
            |name: &str, arguments: Vec<Value>| json!({"name": name, "description": name, "arguments": arguments});
        whole(json!({"prompts": [
            prompt("test_simple_prompt", vec![]),
            prompt("test_prompt_with_arguments", vec![argument("arg1"), argument("arg2")]),
            prompt("test_prompt_with_embedded_resource", vec![argument("resourceUri")]),
            prompt("test_prompt_with_image", vec![]),
            prompt("test_input_required_result_prompt", vec![]),
        ]}))
    }

    async fn get_prompt(&self, params: GetPromptRequestParams, _: Context) -> Result<GetPromptResponse, ErrorData> {
        let arguments = Value::Object(params.arguments.unwrap_or_default());
        let argument = |name: &str| arguments[name].as_str().unwrap_or_default().to_owned();
        let said = |text: &str| json!({"type": "text", "text": text});
        let blocks = match params.name.as_str() {
            "test_simple_prompt" => vec![said("This is a simple prompt for testing.")],
            "test_prompt_with_arguments" => {
                let (one, two) = (argument("arg1"), argument("arg2"));
                vec![said(&format!("Prompt with arguments: arg1='{one}', arg2='{two}'"))]
            }
            "test_prompt_with_embedded_resource" => {
                let embedded =
                    resource(&argument("resourceUri"), "text/plain", "Embedded resource content for testing.");
                vec![embedded, said("Please process the embedded resource above.")]
            }
            "test_prompt_with_image" => vec![picture(), said("Please analyze the image above.")],
            "test_input_required_result_prompt" => {
                let responses = params.input_responses.unwrap_or_default();
                let Some(context) = given(&responses, "user_context", "context").and_then(Value::as_str) else {
                    let asked =
                        json!({"user_context": question("What context should the prompt use?", "context", "string")});
                    return Ok(required(asked, None)?.into());
                };
                vec![said(&format!("In the context of {context}"))]
            }
            _ => return Err(ErrorData::invalid_params("there is no such prompt", None)),
        };
        let messages: Vec<_> = blocks.into_iter().map(|block| json!({"role": "user", "content": block})).collect();
        Ok(whole::<GetPromptResult>(json!({ "messages": messages }))?.into())
    }
}
