"""The paper's analyses: each measures one claim and shows it beside ours."""
