// The page's words. Its English stands where it is used; here it is the key, as in gettext.
// JSON, for a test reads it: every word of the page in every language of ../locales.
const WORDS = {
  "ko": {
    "LCM-LoRA jobs": "LCM-LoRA 작업",
    "The newest {shown} of {total} are shown.": "전체 {total}개 중 최신 {shown}개를 표시합니다.",
    "No jobs yet. Queue a graph with the node “Distill LCM-LoRA (background)”.": "아직 작업이 없습니다. “LCM-LoRA 증류 (백그라운드)” 노드가 있는 그래프를 큐에 넣으세요.",
    "queued": "대기 중",
    "preparing": "준비 중",
    "running": "실행 중",
    "paused": "일시 정지됨",
    "stopping": "중지하는 중",
    "done": "완료",
    "failed": "실패",
    "lost": "프로세스 사라짐",
    "step {step} of {steps}": "{steps}스텝 중 {step}스텝",
    "loss {loss}": "손실 {loss}",
    "{hours} h {minutes} min left": "{hours}시간 {minutes}분 남음",
    "{minutes} min left": "{minutes}분 남음",
    "{seconds} s left": "{seconds}초 남음",
    "use in graph": "그래프에서 사용",
    "up": "위로",
    "down": "아래로",
    "pause": "일시 정지",
    "finish now": "지금 마무리",
    "resume": "재개",
    "stop": "중지",
    "delete": "삭제",
    "really delete?": "정말 삭제할까요?",
    "sample pictures over time": "시간에 따른 샘플 이미지",
    "teacher": "교사",
    "1 step": "1스텝",
    "2 steps": "2스텝",
    "4 steps": "4스텝",
    "log": "로그",
    "loss": "손실",
    "distance to the teacher": "교사와의 거리",
    "sample pictures after step {step}: teacher, 1, 2 and 4 steps": "{step}스텝 후의 샘플 이미지: 교사, 1, 2, 4스텝",
    "after step {step}": "{step}스텝 후",
    "{title} to step {step}: {values}": "{step}스텝까지의 {title}: {values}",
    "The server answered {status}.": "서버가 {status}(으)로 응답했습니다.",
    "LCM-LoRA is ready": "LCM-LoRA가 준비되었습니다",
    "Distillation failed: {name}": "증류 실패: {name}"
  },
  "ja": {
    "LCM-LoRA jobs": "LCM-LoRAジョブ",
    "The newest {shown} of {total} are shown.": "全{total}件のうち最新の{shown}件を表示しています。",
    "No jobs yet. Queue a graph with the node “Distill LCM-LoRA (background)”.": "ジョブはまだありません。「LCM-LoRAを蒸留（バックグラウンド）」ノードのあるグラフをキューに入れてください。",
    "queued": "待機中",
    "preparing": "準備中",
    "running": "実行中",
    "paused": "一時停止中",
    "stopping": "停止処理中",
    "done": "完了",
    "failed": "失敗",
    "lost": "プロセス消失",
    "step {step} of {steps}": "ステップ {step}/{steps}",
    "loss {loss}": "損失 {loss}",
    "{hours} h {minutes} min left": "残り{hours}時間{minutes}分",
    "{minutes} min left": "残り{minutes}分",
    "{seconds} s left": "残り{seconds}秒",
    "use in graph": "グラフで使う",
    "up": "上へ",
    "down": "下へ",
    "pause": "一時停止",
    "finish now": "今すぐ仕上げる",
    "resume": "再開",
    "stop": "停止",
    "delete": "削除",
    "really delete?": "本当に削除しますか？",
    "sample pictures over time": "サンプル画像の推移",
    "teacher": "教師",
    "1 step": "1ステップ",
    "2 steps": "2ステップ",
    "4 steps": "4ステップ",
    "log": "ログ",
    "loss": "損失",
    "distance to the teacher": "教師との距離",
    "sample pictures after step {step}: teacher, 1, 2 and 4 steps": "ステップ{step}後のサンプル画像：教師、1、2、4ステップ",
    "after step {step}": "ステップ{step}後",
    "{title} to step {step}: {values}": "ステップ{step}までの{title}：{values}",
    "The server answered {status}.": "サーバーの応答は{status}でした。",
    "LCM-LoRA is ready": "LCM-LoRAができました",
    "Distillation failed: {name}": "蒸留に失敗しました：{name}"
  },
  "zh": {
    "LCM-LoRA jobs": "LCM-LoRA 任务",
    "The newest {shown} of {total} are shown.": "共 {total} 个，显示最新的 {shown} 个。",
    "No jobs yet. Queue a graph with the node “Distill LCM-LoRA (background)”.": "还没有任务。请将含有“蒸馏 LCM-LoRA（后台）”节点的工作流加入队列。",
    "queued": "排队中",
    "preparing": "准备中",
    "running": "运行中",
    "paused": "已暂停",
    "stopping": "正在停止",
    "done": "已完成",
    "failed": "失败",
    "lost": "进程已消失",
    "step {step} of {steps}": "第 {step} 步，共 {steps} 步",
    "loss {loss}": "损失 {loss}",
    "{hours} h {minutes} min left": "剩余 {hours} 小时 {minutes} 分钟",
    "{minutes} min left": "剩余 {minutes} 分钟",
    "{seconds} s left": "剩余 {seconds} 秒",
    "use in graph": "用于工作流",
    "up": "上移",
    "down": "下移",
    "pause": "暂停",
    "finish now": "立即完成",
    "resume": "继续",
    "stop": "停止",
    "delete": "删除",
    "really delete?": "确定删除？",
    "sample pictures over time": "各阶段的样图",
    "teacher": "教师",
    "1 step": "1 步",
    "2 steps": "2 步",
    "4 steps": "4 步",
    "log": "日志",
    "loss": "损失",
    "distance to the teacher": "与教师的距离",
    "sample pictures after step {step}: teacher, 1, 2 and 4 steps": "第 {step} 步后的样图：教师，1、2、4 步",
    "after step {step}": "第 {step} 步后",
    "{title} to step {step}: {values}": "到第 {step} 步的{title}：{values}",
    "The server answered {status}.": "服务器返回 {status}。",
    "LCM-LoRA is ready": "LCM-LoRA 已就绪",
    "Distillation failed: {name}": "蒸馏失败：{name}"
  }
};

let locale = "en";

/** Sets the language of what is said from now on; one without words here keeps the English. */
export function speak(language) {
  locale = language;
}

export function number(value, options) {
  return new Intl.NumberFormat(locale, options).format(value);
}

/** The day and time of seconds since 1970. */
export function date(seconds) {
  return new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "short" })
    .format(seconds * 1000);
}

/** The text in the page's language, each {name} in it replaced by that value. */
export function say(text, values = {}) {
  return (WORDS[locale]?.[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === "number" ? number(value) : value;
  });
}
