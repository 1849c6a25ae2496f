import { app } from "../../scripts/app.js";

app.registerExtension({
    name: "neighbour.note",
    setup() {
        document.body.dataset.neighbour = "here";
    },
});
